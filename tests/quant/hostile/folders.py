"""Damaged folders: config, index, links and pipes, unfinished saves; D of the reliability report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.quant.hostile.craft import (
    BLOCK,
    FIRST,
    INDEX,
    SECOND,
    SECRET,
    SINGLE,
    UP,
    Case,
    adapter,
    file_of,
    floats,
    index,
    model,
    refused,
    sharded,
    text,
    whole,
)
from tests.quant.hostile.kinds import (
    PICKLE,
    link,
    made_folder,
    only_a_pickle,
    pipe,
    remove,
    secret,
    socket,
)

W = f"{UP}.weight"


def hard_linked(folder: Path) -> None:
    """The second shard is the first one, under another name."""
    (folder / SECOND).unlink()
    os.link(folder / FIRST, folder / SECOND)


D_CONFIG: dict[str, Case] = {
    "D01 no config": refused(whole(remove("config.json")), "no such file", "config.json"),
    "D02 an empty config": refused(whole(text("config.json", "")), "is not JSON", "config.json"),
    "D03 a truncated config": refused(
        whole(text("config.json", '{"quantization": ')), "is not JSON", "config.json"
    ),
    "D04 a list": refused(whole(text("config.json", "[]")), "is a list, not an object", "config.json"),
    "D05 null": refused(whole(text("config.json", "null")), "is null", "config.json"),
    "D06 a million lists": refused(
        whole(text("config.json", "[" * 1_000_000)), "nests deeper than 64", "config.json"
    ),
    "D07 not UTF-8": refused(
        whole(text("config.json", b'{"a": "\xff"}')), "is not valid UTF-8", "config.json"
    ),
    "D08 one key twice": refused(
        whole(text("config.json", '{"a": 1, "a": 2}')), "the key 'a' twice", "config.json"
    ),
    "D09 the block twice": refused(
        whole(text("config.json", f'{{"quantization": {json.dumps(BLOCK)}, "quantization": {{}}}}')),
        "the key 'quantization' twice",
        "config.json",
    ),
    "D10 64 MB": refused(
        whole(lambda f: (f / "config.json").write_text('{"a": "' + "x" * 64_000_000 + '"}')),
        "is larger than 64000000 bytes",
        "config.json",
        growth=150,
    ),
    "D15 ten million items": refused(
        whole(lambda f: (f / "config.json").write_text('{"a": [' + "[],[]," * 5_000_000 + "1]}")),
        "more than 2000000 items",
        "config.json",
        growth=100,
    ),
    "D16 a number of 100,000 digits": refused(
        whole(text("config.json", '{"a": ' + "9" * 100_000 + "}")), "a number of 100000 digits", "config.json"
    ),
    "D17 a byte order mark": refused(
        whole(text("config.json", b"\xef\xbb\xbf{}")), "starts with a byte order mark", "config.json"
    ),
}

D_INDEX: dict[str, Case] = {
    "D20 a missing shard": refused(sharded(remove(SECOND)), f"is missing, {INDEX} names it", SECOND),
    "D29 the wrong shard": refused(
        index(lambda w: w.update({W: SECOND})), f"lists it in {SECOND}", FIRST, tensor=W
    ),
    "D30 a ghost": refused(
        index(lambda w: w.update(ghost=FIRST)), f"is not in {FIRST}", INDEX, tensor="ghost"
    ),
    "D31 an unlisted tensor": refused(index(lambda w: w.pop(W)), "does not list it", FIRST, tensor=W),
    "D32 one tensor in both shards": refused(
        sharded(lambda f: (f / SECOND).write_bytes(file_of(model()))), "lists it in", SECOND, tensor=W
    ),
    "D32b a shard under two names, by a hard link": refused(
        sharded(hard_linked), "lists it in", SECOND, tensor=W
    ),
    "D32c a shard under two names, by a link": refused(
        sharded(link(SECOND, FIRST)), "lists it in", SECOND, tensor=W
    ),
    "D33 a stale shard": refused(
        sharded(lambda f: (f / "model-00003-of-00003.safetensors").write_bytes(file_of(model()))),
        f"is not in {INDEX}",
        "model-00003-of-00003.safetensors",
    ),
    "D34 a single file beside the index": refused(
        sharded(lambda f: (f / SINGLE).write_bytes(file_of(model()))), f"is not in {INDEX}"
    ),
    "D35 shards and no index": refused(
        sharded(remove(INDEX)), f"has 2 model*.safetensors files and no {INDEX}", "model"
    ),
    "D37 an index of case variants": refused(
        index(lambda w: w.update({W: "Model-00001-of-00002.safetensors"})), "", "", tensor=None
    ),
    "D38 the index is not JSON": refused(sharded(text(INDEX, "{")), "is not JSON", INDEX),
    "D39 the index is a list": refused(sharded(text(INDEX, "[]")), "is a list", INDEX),
    "D40 no weight_map": refused(sharded(text(INDEX, "{}")), "weight_map is null", INDEX),
    "D40b an empty weight_map": refused(
        sharded(text(INDEX, '{"weight_map": {}}')), "weight_map is empty", INDEX
    ),
    "D40c weight_map is a list": refused(
        sharded(text(INDEX, '{"weight_map": []}')), "weight_map is a list", INDEX
    ),
    "D41 a tensor twice in the index": refused(
        sharded(text(INDEX, '{"weight_map": {"a": "m.safetensors", "a": "m.safetensors"}}')),
        "'a' twice",
        INDEX,
    ),
    "D42 an index of a million lists": refused(
        sharded(text(INDEX, "[" * 1_000_000)), "deeper than 64", INDEX
    ),
} | {
    f"D2{n} the index names {what}": refused(
        index(lambda w, path=path: w.update({W: path})),
        "the plain name" if type(path) is str else "file name is",
        INDEX,
        tensor=W,
    )
    for n, (what, path) in enumerate(
        [
            ("../..", "../../model.safetensors"),
            ("an absolute path", "/etc/passwd"),
            ("an absolute safetensors file", "/tmp/model.safetensors"),
            ("a sub-folder", "sub/model.safetensors"),
            ("a backslash", "a\\b.safetensors"),
            ("a NUL", "model\0.safetensors"),
            ("nothing", ""),
            ("a number", 7),
            ("null", None),
            ("a list", [FIRST]),
            ("a drive", "c:x.safetensors"),
            ("a hidden file", ".model.safetensors"),
            ("its folder", ".."),
            ("a right-to-left override", "model\u202esrotnesafes.safetensors"),
            ("300 letters", "m" * 300 + ".safetensors"),
            ("a pickle", "pytorch_model.bin"),
        ]
    )
}

D_KINDS: dict[str, Case] = {
    "D43 the weights are a link to another file": refused(whole(secret(SINGLE)), "claims a header of"),
    "D43b the config is a link to another file": refused(
        whole(secret("config.json")), "is not JSON", "config.json"
    ),
    "D43c the index is a link to another file": refused(sharded(secret(INDEX)), "is not JSON", INDEX),
    "D43d a shard is a link to another file": refused(sharded(secret(SECOND)), "claims a header of", SECOND),
    "D43e the weights are a link to the users of the machine": refused(
        whole(link(SINGLE, "/etc/passwd")), "header"
    ),
    "D44 a link to itself": refused(whole(link(SINGLE, SINGLE)), "cannot be opened: Too many levels"),
    "D45 a dangling link": refused(whole(link(SINGLE, "gone")), "no such file"),
    "D45b the config is a dangling link": refused(
        whole(link("config.json", "gone")), "no such file", "config.json"
    ),
    "D46 a folder": refused(whole(made_folder(SINGLE)), "is a folder, not a regular file"),
    "D46b the config is a folder": refused(whole(made_folder("config.json")), "is a folder", "config.json"),
    "D46c the index is a folder": refused(sharded(made_folder(INDEX)), "is a folder", INDEX),
    "D47 a pipe": refused(whole(pipe(SINGLE)), "is a pipe, not a regular file"),
    "D48 a shard is a pipe": refused(sharded(pipe(SECOND)), "is a pipe", SECOND),
    "D49 the config is a pipe": refused(whole(pipe("config.json")), "is a pipe", "config.json"),
    "D50 the index is a pipe": refused(sharded(pipe(INDEX)), "is a pipe", INDEX),
    "D51 endless zeros": refused(whole(link(SINGLE, "/dev/zero")), "is a device, not a regular file"),
    "D51b the config is endless zeros": refused(
        whole(link("config.json", "/dev/zero")), "is a device", "config.json"
    ),
    "D51c the index is endless zeros": refused(sharded(link(INDEX, "/dev/zero")), "is a device", INDEX),
    "D51d a device that is always full": refused(whole(link(SINGLE, "/dev/full")), "is a device"),
    "D51e a terminal": refused(whole(link("config.json", "/dev/tty")), "is a device", "config.json"),
    "D51f a socket": refused(whole(socket(SINGLE)), "is a socket"),
    "D51g a link to a pipe": refused(
        whole(lambda f: (pipe("p")(f), link(SINGLE, "p")(f))), "is a pipe, not a regular file"
    ),
    "D52 only a pickle": refused(only_a_pickle, "has no model.safetensors, only pytorch_model.bin", "model"),
    "D52b a pickle renamed": refused(whole(text(SINGLE, PICKLE)), "is a pickle, which can run code"),
    "D53 an empty folder": refused(lambda f: f, "has no model.safetensors", "model"),
    "D54 nothing there": refused(lambda f: f / "absent", "no such file or folder", "absent"),
    "D55 an adapter": refused(adapter(), "is an adapter, not a model", "model"),
    "D56 other names": refused(
        whole(lambda f: (f / SINGLE).rename(f / "Model.Safetensors")), "has no model.safetensors", "model"
    ),
    "D57 a path of 5,000 letters": refused(lambda f: f / ("x" * 5000), "no such file or folder", "xxx"),
    "D58 a name that is not UTF-8": refused(
        whole(lambda f: (f / SINGLE).rename(os.fsdecode(os.fsencode(f) + b"/model\xff.safetensors"))),
        "not UTF-8",
        "model\\udcff.safetensors",
    ),
}


def record(value: object, *, stray: bool = False) -> Any:
    def change(folder: Path) -> None:
        (folder / ".qgraph-save.json").write_text(value if isinstance(value, str) else json.dumps(value))
        if stray:
            (folder.parent / "outside.safetensors").write_bytes(file_of({SECRET: floats(2)}))

    return change


RECORD = ".qgraph-save.json"


def unfinished(folder: Path) -> None:
    (folder / "config.json").unlink()
    record({"files": {"config.json": [".config.json.0123456789abcdef.tmp", 1, 1]}})(folder)


D_RECORD: dict[str, Case] = {
    "R01 the record of a save is not JSON": refused(whole(record("{")), "is not JSON", RECORD),
    "R02 it names no files": refused(whole(record({})), "files is null", RECORD),
    "R03 it points out of the folder": refused(
        whole(record({"files": {SINGLE: ["../outside.safetensors", 1, 1]}}, stray=True)),
        "is not the record",
        RECORD,
    ),
    "R04 it replaces any file": refused(
        whole(record({"files": {"../x": [".../x.0123456789abcdef.tmp", 1, 1]}})), "is not the record", RECORD
    ),
    "R05 its file is another one": refused(
        whole(record({"files": {SINGLE: [f".{SINGLE}.0123456789abcdef.tmp", 1, 1]}})),
        "is not the file",
        RECORD,
    ),
    "R06 its file is missing": refused(whole(unfinished), "but config.json is missing", RECORD),
    "R07 the record is a pipe": refused(whole(pipe(RECORD)), "is a pipe", RECORD),
}
