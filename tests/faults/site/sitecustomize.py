"""Imported by Python at its start where PYTHONPATH has this folder: every process of a run gets the fault."""

from tests.faults.plant import plant

if __name__ == "sitecustomize":  # not where it is merely looked at
    plant()
