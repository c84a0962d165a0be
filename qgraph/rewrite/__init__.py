"""Rewriting: rules, passes, pipelines, and the report of what they did."""

from qgraph.rewrite.context import Context as Context
from qgraph.rewrite.match import NoMatch as NoMatch
from qgraph.rewrite.passes import Pass as Pass
from qgraph.rewrite.pattern import Quantized as Quantized
from qgraph.rewrite.pattern import Scalar as Scalar
from qgraph.rewrite.pattern import any_of as any_of
from qgraph.rewrite.pipeline import DEFAULT as DEFAULT
from qgraph.rewrite.pipeline import Pipeline as Pipeline
from qgraph.rewrite.pipeline import Result as Result
from qgraph.rewrite.pipeline import Stage as Stage
from qgraph.rewrite.registry import passes as passes
from qgraph.rewrite.registry import register as register
from qgraph.rewrite.report import Report as Report
from qgraph.rewrite.report import Site as Site
from qgraph.rewrite.rule import Match as Match
from qgraph.rewrite.rule import Rule as Rule
