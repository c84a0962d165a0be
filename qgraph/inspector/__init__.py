"""Looking at graphs: what the passes did, in text, JSON and Graphviz. Reads graphs, never changes them."""

from qgraph.inspector.dump import FORMATS as FORMATS
from qgraph.inspector.dump import render as render
from qgraph.inspector.inspect import Inspection as Inspection
from qgraph.inspector.inspect import inspect as inspect
from qgraph.inspector.summary import Summary as Summary
from qgraph.inspector.summary import summarize as summarize
from qgraph.inspector.why import explain as explain
