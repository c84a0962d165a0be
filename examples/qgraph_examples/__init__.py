"""Models written against qgraph, and the demo model that `qgraph demo` runs."""
