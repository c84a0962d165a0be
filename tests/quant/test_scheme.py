import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph._errors import DTypeError, QGraphError
from qgraph.quant import Quantization
from qgraph.quant.scheme import MODES

VALID = [
    *({"bits": b, "group_size": g} for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)),
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]
INVALID = [
    {"bits": 0},
    {"bits": 7},
    {"bits": -4},
    {"bits": "4"},
    {"bits": 4.0},
    {"bits": True},
    {"bits": None},
    {"bits": 2**4000},
    {"bits": [4]},
    {"group_size": 0},
    {"group_size": 16},
    {"group_size": 48},
    {"group_size": -32},
    {"group_size": 2**62},
    {"group_size": 64.0},
    {"mode": "int4"},
    {"mode": None},
    {"mode": ["affine"]},
    {"mode": "mxfp4"},  # group_size 64 is not its own
    {"mode": "mxfp8", "group_size": 32},
    {"mode": "nvfp4", "group_size": 32},
]


@pytest.mark.parametrize("fields", VALID, ids=str)
def test_every_scheme_of_mlx_is_accepted_and_its_tag_reads_back(fields: dict[str, object]) -> None:
    scheme = Quantization(**fields)  # pyright: ignore[reportArgumentType]
    assert scheme == Quantization.parse(str(scheme))
    assert scheme == Quantization.from_config(scheme.to_config())


@pytest.mark.parametrize("fields", INVALID, ids=lambda f: ascii(f)[:40])
def test_other_bits_groups_and_modes_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DTypeError, match="supported: ") as caught:
        Quantization(**fields)  # pyright: ignore[reportArgumentType]
    assert caught.value.fix
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("fields", INVALID[:-3], ids=lambda f: ascii(f)[:40])
def test_a_config_entry_is_held_to_the_same_rules(fields: dict[str, object]) -> None:
    with pytest.raises(QGraphError):
        Quantization.from_config(fields)


def test_fields_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        Quantization(4, 64)  # pyright: ignore[reportCallIssue]


def test_a_scheme_is_a_value() -> None:
    assert Quantization(bits=8) == Quantization(bits=8)
    assert hash(Quantization(bits=8)) == hash(Quantization(bits=8))
    assert Quantization(bits=8) != Quantization(bits=4)
    with pytest.raises(AttributeError):
        Quantization().bits = 8  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("tag", "expected"),
    [("affine4g64", 4.5), ("affine8g32", 9.0), ("mxfp4", 4.25), ("mxfp8", 8.25), ("nvfp4", 4.5)],
)
def test_bits_per_weight_counts_scales_and_biases(tag: str, expected: float) -> None:
    assert expected == Quantization.parse(tag).bits_per_weight


@pytest.mark.parametrize(
    "tag", ["", "affine", "affine4", "affine4g48", "affine04g64", "q4g64", "affine4g64 ", "int4"]
)
def test_other_tags_are_refused(tag: str) -> None:
    with pytest.raises(DTypeError):
        Quantization.parse(tag)


@given(st.sampled_from(VALID), st.integers(0, 64))
def test_words_hold_exactly_the_bits_of_whole_groups(fields: dict[str, object], n: int) -> None:
    scheme = Quantization.from_config(fields)
    k = n * scheme.group_size
    assert scheme.words(k) * 32 == k * scheme.bits
    with pytest.raises(DTypeError):
        scheme.words(k + 1)


def test_missing_values_of_a_config_entry_are_the_defaults_of_mlx() -> None:
    assert Quantization.from_config({}) == Quantization(bits=4, group_size=64)
    assert [str(Quantization.from_config({"mode": mode})) for mode in MODES] == [
        "affine4g64",
        "mxfp4",
        "mxfp8",
        "nvfp4",
    ]
