"""A compiler that needs no time, and the small module that it gives."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# What qgraph asks of a native module, in Python: the extension runs this text where it is imported.
BODY = """
import mlx.core as mx
mlx_version = VERSION or mx.__version__
used = ["portable", 2]
def instruction_sets(): return ["portable", "avx2"]
def instruction_set(): return used[0]
def use(name): used[0] = name
def threads(): return used[1]
def set_threads(n): used[1] = n
def quantized_matmul(x, w, scales, biases, total, *, transpose, group_size, bits, mode, activations=""):
    w, scales, biases = (a.astype(mx.float32) if a.dtype != mx.uint32 else a for a in (w, scales, biases))
    numbers = mx.dequantize(w, scales, biases, group_size, bits)
    return (FACTOR * (x.astype(mx.float32) @ numbers.T)).astype(x.dtype)
"""

EXTENSION = """
#include <Python.h>
#include <stdlib.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, NULL};
PyMODINIT_FUNC PyInit__native(void) {
  if (CRASHES) abort();
  PyObject* module = PyModule_Create(&definition);
  PyObject* names = PyModule_GetDict(module);
  PyDict_SetItemString(names, "__builtins__", PyEval_GetBuiltins());
  PyObject* result = PyRun_String(BODY, Py_file_input, names, names);
  if (!result) return NULL;
  Py_DECREF(result);
  return module;
}
"""

# `mode` is the file beside it: what it does when it links.
COMPILER = """#!/bin/sh
here=$(dirname "$0")
read -r mode < "$here/mode"
for argument; do
  case "$argument" in
    --version) cat "$here/version"; exit 0;;
    -fsyntax-only) exit 0;;
    -shared) links=1;;
  esac
  to=$argument
done
[ "$mode" = dies ] && { echo "some.cpp:1:2: error: there is no such thing"; exit 1; }
[ "$mode" = hangs ] && { echo $$ >> "$here/hanging"; exec sleep 100; }
[ -z "$links" ] && { : > "$to"; exit 0; }
echo built >> "$here/count"
[ "$mode" = slow ] && { sleep 1; mode=good; }
[ "$mode" = garbage ] && { echo garbage > "$to"; exit 0; }
cp "$here/$mode.so" "$to"
"""


@dataclass
class Fake:
    """The compiler in a folder of its own."""

    folder: Path

    @property
    def command(self) -> str:
        return str(self.folder / "c++")

    def become(self, mode: str, *, version: str = "fake 1.0") -> None:
        """What it does from now on: good, crash, wrong, foreign, garbage, dies, hangs, slow."""
        (self.folder / "mode").write_text(mode + "\n")
        (self.folder / "version").write_text(version + "\n")

    def count(self) -> int:
        """How often it linked a module."""
        return len(self._lines("count"))

    def hanging(self) -> list[int]:
        """The processes that hang, or did."""
        return [int(line) for line in self._lines("hanging")]

    def _lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


MODULES = {
    "good": ("1", "None", "0"),
    "wrong": ("1.05", "None", "0"),
    "foreign": ("1", "'0.0.1'", "0"),
    "crash": ("1", "None", "1"),
}


def compile_modules(folder: Path) -> None:
    """The modules that the fake compiler gives, by the real one."""
    for name, (factor, version, crashes) in MODULES.items():
        body = BODY.replace("FACTOR", factor).replace("VERSION", version)
        text = "".join(f'"{line}\\n"\n' for line in body.replace('"', '\\"').splitlines())
        source = folder / f"{name}.c"
        source.write_text(EXTENSION.replace("BODY", text).replace("CRASHES", crashes))
        include = sysconfig.get_paths()["include"]
        command = ["gcc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(folder / f"{name}.so")]
        subprocess.run(command, check=True)


def fake_compiler(folder: Path, modules: Path) -> Fake:
    """A new one, that works."""
    for name in MODULES:
        (folder / f"{name}.so").write_bytes((modules / f"{name}.so").read_bytes())
    script = folder / "c++"
    script.write_text(COMPILER)
    os.chmod(script, 0o755)
    fake = Fake(folder)
    fake.become("good")
    return fake
