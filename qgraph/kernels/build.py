"""Compile the kernels on the user's machine."""
from __future__ import annotations
import os, subprocess, sys, sysconfig, tempfile, platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
FLAGS = {"avx512vnni": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c".split(), "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c".split(), "avx2": "-mavx2 -mfma -mf16c".split(), "portable": []}

def build(out: Path, sets=("avx512vnni", "avx512", "avx2", "portable"), extra=(), objects: Path | None = None) -> Path:
    import mlx, nanobind
    mlx_dir = Path(list(mlx.__path__)[0]); nb = Path(nanobind.__file__).parent
    objects = objects or Path(tempfile.mkdtemp()); objects.mkdir(parents=True, exist_ok=True)
    common = ["g++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-DNDEBUG", "-DNB_DOMAIN=mlx", "-DNB_COMPACT_ASSERTIONS",
        f"-I{mlx_dir/'include'}", f"-I{nb/'include'}", f"-I{nb/'ext/robin_map/include'}", "-I" + sysconfig.get_paths()["include"], f"-I{SOURCE}",
        "-DQGRAPH_SETS=" + " ".join(f"X({s})" for s in sets), *extra]
    headers = max(p.stat().st_mtime for p in SOURCE.rglob("*.h"))
    files = [*SOURCE.glob("*.cpp"), *SOURCE.glob("primitives/*.cpp"), *[SOURCE/"isa"/f"{s}.cpp" for s in sets], nb/"src/nb_combined.cpp"]
    def one(f):
        o = objects / (f.parent.name + "_" + f.stem + ".o")
        if not o.exists() or o.stat().st_mtime < (f.stat().st_mtime if "nb_" in f.name else max(headers, f.stat().st_mtime)):
            subprocess.run([*common, *(FLAGS[f.stem] if f.parent.name == "isa" else []), "-c", str(f), "-o", str(o)], check=True)
        return str(o)
    with ThreadPoolExecutor(2) as pool: os_ = list(pool.map(one, files))
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["g++", "-shared", *extra, *os_, f"-L{mlx_dir/'lib'}", "-lmlx", "-lpthread", "-o", str(out)], check=True)
    return out

if __name__ == "__main__":
    where = Path(sys.argv[1]); print(build(where / ("_native" + sysconfig.get_config_var("EXT_SUFFIX")), tuple(sys.argv[2].split(",")) if len(sys.argv) > 2 else ("avx512vnni", "avx512", "avx2", "portable"), objects=where / "objects"))
