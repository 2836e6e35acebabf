"""A kernel gives the same bits in the process that compiles it and in the next one, which loads it from the disk.

A killed run goes on in another process, and must not notice.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.ops.cpu import compiled

SCRIPT = """
import hashlib
import numpy as np
from rorqual.ops.cpu.attention import RowReads, attend_next, attend_once
from rorqual.ops.cpu.block import BlockWeights, decode_block
from rorqual.ops.cpu.draw import draw_whole
from rorqual.ops.cpu.pointwise import rms_norm, rms_norm_backward, rotate_halves, swiglu, swiglu_backward

rng = np.random.default_rng(0)

def random(*shape):
    return rng.standard_normal(shape, dtype=np.float32)

def show(name, *arrays):
    print(name, hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest())

ROWS, WIDTH, HEAD = 37, 48, 16
reads = RowReads(np.arange(ROWS), np.arange(ROWS) % 23 + 9, np.full(ROWS, 3), np.full(ROWS, 7))
cos, sin = random(ROWS, HEAD), random(ROWS, HEAD)

def decode():
    none = np.empty(0, dtype=np.float32)
    shapes = {
        "input_norm": (WIDTH,), "q": (64, WIDTH), "k": (32, WIDTH), "v": (32, WIDTH), "q_norm": (HEAD,),
        "k_norm": (HEAD,), "o": (WIDTH, 64), "post_norm": (WIDTH,), "gate": (90, WIDTH), "up": (90, WIDTH),
        "down": (WIDTH, 90), "q_bias": (64,), "down_bias": (WIDTH,),
    }
    weights = BlockWeights(**{name: random(*shapes[name]) if name in shapes else none for name in BlockWeights._fields})
    x, keys, values = random(ROWS, WIDTH), random(ROWS, 40, 2, HEAD), random(ROWS, 40, 2, HEAD)
    decode_block(x, weights, cos, sin, keys, values, reads, 1e-6, 0.25)
    show("decode_block", x, keys, values)

def attend():
    for heads, groups in ((4, 2), (6, 2), (3, 3)):
        q, keys, values = random(ROWS, heads, HEAD), random(ROWS, 40, groups, HEAD), random(ROWS, 40, groups, HEAD)
        out = np.empty_like(q)
        attend_once(q, keys, values, reads, 0.25, out)
        show("attend_once", out)
        attend_next(q, random(ROWS, groups, HEAD), random(ROWS, groups, HEAD), cos, sin, keys, values, reads, 0.25, out)
        show("attend_next", out, keys, values)
    latent = random(ROWS, 40, 1, HEAD + 8)
    q, out = random(ROWS, 4, HEAD + 8), np.empty((ROWS, 4, HEAD), dtype=np.float32)
    attend_once(q, latent, latent[..., :HEAD], reads, 0.25, out)
    show("attend_once of a latent", out)

def pointwise():
    x, weight, gradient = random(ROWS, WIDTH), random(WIDTH), random(ROWS, WIDTH)
    out, inverse, x_gradient = np.empty_like(x), np.empty(ROWS, dtype=np.float32), np.empty_like(x)
    weight_gradient = np.zeros_like(weight)
    rms_norm(x, weight, 1e-6, out, inverse)
    rms_norm_backward(gradient, x, weight, inverse, x_gradient, weight_gradient)
    show("rms_norm", out, inverse, x_gradient, weight_gradient)
    up, up_gradient = random(ROWS, WIDTH), np.empty_like(x)
    swiglu(x, up, out)
    swiglu_backward(gradient, x, up, x_gradient, up_gradient)
    show("swiglu", out, x_gradient, up_gradient)
    turned = np.empty((ROWS, 3, 2, HEAD // 2), dtype=np.float32)
    rotate_halves(random(*turned.shape), cos.reshape(ROWS, 2, -1), sin.reshape(ROWS, 2, -1), 1.0, turned)
    show("rotate_halves", turned)

def draw():
    logits, token = random(ROWS, 700), np.empty(ROWS, dtype=np.int64)
    logprob, entropy = np.empty((2, ROWS), dtype=np.float32)
    draw_whole(logits, logits.max(axis=1), np.ones(ROWS, dtype=np.float32), rng.random(ROWS), token, logprob, entropy)
    show("draw_whole", token, logprob, entropy)

decode(); attend(); pointwise(); draw()
"""


def digests(cache: Path) -> list[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(Path(__file__).parents[3])}
    answer = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def test_compiled_here_and_loaded_from_the_disk_are_equal_bit_for_bit(tmp_path: Path) -> None:
    compiled_here = digests(tmp_path)
    assert any(tmp_path.rglob("*.nbc")), "nothing was kept on the disk, so nothing is tested"
    assert len(compiled_here) == 12
    assert digests(tmp_path) == compiled_here


@pytest.mark.skipif(compiled.NUMBA is None, reason="numba is not installed")
def test_a_change_of_any_source_compiles_anew(tmp_path: Path) -> None:
    """numba's own check would miss a change in a function that another file's kernel calls."""
    package = tmp_path / "package"
    package.mkdir()
    for source in Path(compiled.__file__).parent.glob("*.py"):
        (package / source.name).write_text(source.read_text().replace("rorqual.ops.cpu", "package"))
    (package / "inner.py").write_text("from package.compiled import compiled\n@compiled\ndef f(x):\n    return x + 1\n")
    (package / "outer.py").write_text(
        "from package.compiled import compiled\nfrom package.inner import f\n"
        "@compiled\ndef g(x):\n    return 2 * f(x)\nprint(g(1))\n"
    )

    def answer() -> str:
        command = [sys.executable, "-c", "import package.outer"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert answer() == "4"
    (package / "inner.py").write_text((package / "inner.py").read_text().replace("x + 1", "x + 2"))
    assert answer() == "6"


@pytest.mark.skipif(compiled.NUMBA is None, reason="numba is not installed")
@pytest.mark.parametrize("damage", ("empty", "cut", "flipped"))
def test_a_damaged_file_is_made_anew(damage: str, tmp_path: Path) -> None:
    script = (
        "import numpy as np\nfrom rorqual.ops.cpu.pointwise import swiglu\n"
        "x, out = np.ones((2, 3), np.float32), np.empty((2, 3), np.float32)\nswiglu(x, x, out)\nprint(out[0, 0])"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}

    def answer() -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    expected = answer()
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) == 2
    for path in files:
        content = path.read_bytes()
        changed = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "flipped": content[:-400] + bytes(255 - each for each in content[-400:]),
        }
        path.write_bytes(changed[damage])
        assert answer() == expected
    assert answer() == expected


@pytest.mark.skipif(compiled.NUMBA is None, reason="numba is not installed")
def test_a_read_only_install_without_a_home_still_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs as a user without a folder of its own."""
    monkeypatch.setattr(compiled.NUMBA.config, "CACHE_DIR", "")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/dev/null/nowhere")
    monkeypatch.setattr(compiled, "__file__", "/proc/compiled.py")
    found = compiled._cache_directory()
    assert found is not None and found.is_dir() and os.access(found, os.W_OK)
    found.rmdir()
