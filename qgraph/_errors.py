"""Every error that qgraph raises on purpose. The docstring of a class is its manual page."""

from __future__ import annotations


class QGraphError(Exception):
    """The base of all qgraph errors: catch it to catch them all.

    The text has the message on the first line, then, where they are known, the graph node, the
    user's own source line and the fix.

    Attributes:
        message: What is wrong, with the shapes, dtypes or names involved.
        node: The text of the graph node at fault, e.g. ``%7 = dot(%3: f16[1,4096], ...)``.
        where: The user's source, e.g. ``model.py:41 in attention:  q = x @ wq.T``.
        fix: What to do about it.

    The attributes can be filled in later, by an outer layer that knows more:

    >>> error = QGraphError("dot: inner sizes differ, 4 and 5", fix="make both equal")
    >>> error.where = "model.py:41 in attention:  q = x @ wq.T"
    >>> print(error)
    dot: inner sizes differ, 4 and 5
      from model.py:41 in attention:  q = x @ wq.T
      fix: make both equal
    """

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        """Keep the parts; ``str()`` joins the ones that are known."""
        super().__init__(message)
        self.message = message
        self.node = node
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        """The message, then one indented line for each known part."""
        parts = (("at", self.node), ("from", self.where), ("fix:", self.fix))
        lines = [f"  {label} {text}" for label, text in parts if text]
        return "\n".join([self.message, *lines])


class CheckpointError(QGraphError):
    """A checkpoint, a config or an adapter cannot be loaded or saved as it is.

    The message names the file, the tensor where there is one, and the cause. Nothing was loaded
    or published, not even partly; a save that fails leaves the old files as they were. Names that
    come from a file are escaped and clipped, so that a hostile file cannot write to the terminal.

    >>> from qgraph.quant import load
    >>> load("no/such/folder")
    Traceback (most recent call last):
        ...
    qgraph._errors.CheckpointError: folder: no such file or folder
      fix: pass a .safetensors file, or a folder with config.json and model.safetensors

    Usual causes and fixes:

    - *cut or changed file* ("has N bytes, needs M"): download it again.
    - *config.json contradicts the tensors*: correct ``quantization`` (bits, group_size, mode), or
      add an entry for the layer; shapes alone do not tell 4 bit / 64 from 8 bit / 32.
    - *foreign format* (pickle, GGUF, a git-lfs pointer): convert it, or fetch the real file.
    - *NaN or infinity in scales*: the file is damaged; ``allow_nonfinite=True`` loads it anyway.
    """


class ShapeError(QGraphError):
    """Shapes do not fit together, or do not fit the operation.

    The message gives the sizes and the axes they stand on.

    >>> import mlx.core as mx
    >>> from qgraph.quant import Quantization, pack
    >>> pack(mx.ones((8, 100)), Quantization(bits=4, group_size=64))
    Traceback (most recent call last):
        ...
    qgraph._errors.ShapeError: pack: the last axis has 100 elements, not a multiple of group_size 64
      fix: pad the last axis to 128, or pick a group_size that divides 100

    The fix is in the last line. A frequent one: checkpoints store a linear weight as (out, in), so
    the product is ``x @ w.T``.
    """


class DTypeError(QGraphError, TypeError):
    """A dtype, a kind of object or a quantization scheme that the operation does not take.

    It is a ``TypeError`` too, so that code which tries ``len(x)`` or ``float(x)`` on a packed
    weight sees the exception it expects.

    >>> from qgraph.quant import Quantization
    >>> Quantization(bits=7)
    Traceback (most recent call last):
        ...
    qgraph._errors.DTypeError: affine: bits is 7, supported: 1, 2, 3, 4, 5, 6, 8
      fix: pick one of the supported values

    The fix is to cast first (``x.astype(mx.float32)``), to unpack first (``qg.dequantize(w)``), or
    to pick a scheme from the list in the message.
    """


class TraceError(QGraphError):
    """A Python construct needs the value of an array that is only being traced.

    While ``qg.jit`` runs a function, its arrays have a shape and a dtype but no numbers, so
    ``if x.sum() > 0:``, ``x.item()``, ``float(x)`` and ``numpy.array(x)`` cannot be answered, and
    a function of ``mlx.core`` cannot take a traced value. A traced value kept after the trace
    ended raises this error too. Failing::

        @qg.jit
        def f(x):
            if x.sum() > 0:        # TraceError: names this line
                return x
            return -x

    Fix: compute both and select with ``qg.where(x.sum() > 0, x, -x)``; pass what decides as a
    plain Python value (those are static, one program for each); call ``qg.*`` instead of ``mx.*``;
    or capture unmodified MLX code with ``qg.optimize(f)``.
    """


class RuleError(QGraphError):
    """A rewrite rule or a pass is written wrongly, or a pipeline text cannot be read.

    Raised when a rule is declared (its pattern binds no value, its rewrite uses a name that the
    pattern does not bind), when a pass name is unknown or taken, and when a pass option has the
    wrong type. Failing::

        "canonicalize,quantise-dot"     # RuleError: no pass quantise-dot

    Fix: the message lists the names or options that exist, the nearest one first.
    """


class VerifyError(QGraphError):
    """A graph breaks a rule of the IR, or a rewrite changed the numbers.

    Raised after a pass that left a graph with wrong types, values used before they are made, or
    outputs of another shape; and by the numeric check when a rewritten graph leaves the error
    bound against the float64 reference. The node and the pass are named. Failing: a rule that
    rewrites ``dot(x, w)`` to ``dot(w, x)`` while both are square has the right types and the wrong
    numbers, and only the numeric check finds it.

    Fix: correct the rule; ``qg.testing`` reduces the graph to the few nodes that show the fault.
    """


class NonFiniteError(QGraphError):
    """A result holds NaN or infinities that it should not.

    `qg.lm` raises it for logits that give no next token: that request ends, the model stays usable. With
    ``QGRAPH_DEBUG_NAN=1`` every program checks its results. Where one is not finite, the graph runs again
    node by node on the same arrays, and the error names the first node to blame: its op, its module, the
    line, how many elements, and how large its operands are. Blamed is the first node on the way to the
    bad result that

    - makes NaN while no operand holds NaN, or makes infinities while all operands are finite;
    - is not made of constants alone: a mask of ``-inf``, and what chooses from it (``where``, ``pad``),
      is no fault. A row of attention that is masked everywhere still is: softmax makes NaN of it;
    - failing that, an input that holds NaN.

    Where MLX traces the program (``mx.compile``, ``mx.vmap``) there are no numbers to look at, and nothing
    is checked. The variable is read when a program is made; the check waits for every result.

    Usual causes: a product or a sum too large for float16 (compute in float32 or bfloat16), the logarithm
    or the reciprocal of 0, an index out of range (reading there gives NaN), damaged weights.
    """


class RecompileWarning(UserWarning):
    """A jitted function made many programs that differ in one thing only: a recompile storm.

    Every program costs a trace, the passes and, on a GPU, new kernels. The text names the argument that
    changed, with its values, and the fix; it comes once for a function and an argument, at the eighth
    program. Failing::

        for step in range(1000):
            loss = train_step(params, batch, 0.1 / (1 + step))   # a new number is a new program

    Fix: pass numbers that change as arrays (``mx.array(0.1 / (1 + step))``); pad sequences, or round
    their lengths up to a few (buckets). Where the programs are wanted::

        warnings.filterwarnings("ignore", category=qg.RecompileWarning)
    """


class StrictError(QGraphError):
    """A strict run met a case that would otherwise fall back to a slower, equal program.

    Without ``strict`` a quantized operand that has no packed kernel (a contraction over the wrong
    axis, say) is dequantized, and the report says why; with ``quantize-dot{strict=true}`` this
    error carries the same reason.

    Fix: change what the reason names (mostly the orientation of the weight), or drop ``strict``.
    """
