"""How optional kernels are called, held against the sources of the packages that are installed.

Read, not imported: most of them want a GPU as soon as they are.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

LIGER = "liger_kernel/ops/rms_norm.py:LigerRMSNormFunction.forward"
FLASH = "flash_attn/flash_attn_interface.py:flash_attn_varlen_func"
TE_ADAM = "transformer_engine/pytorch/optimizers/fused_adam.py:FusedAdam.__init__"
TE_ROTARY = "transformer_engine/pytorch/attention/rope.py:apply_rotary_pos_emb"
APEX_ADAM = "apex/optimizers/fused_adam.py:FusedAdam.__init__"
ADAM = ((), ("params", "lr", "weight_decay", "betas", "eps", "adam_w_mode"))

CALLS = {
    FLASH: (
        ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        ("softmax_scale", "causal", "deterministic"),
    ),
    LIGER: (("ctx", "X", "W", "eps", "offset", "casting_mode", "in_place"), ()),
    TE_ROTARY: (("t", "freqs"), ("tensor_format", "interleaved", "fused")),
    TE_ADAM: ADAM,
    APEX_ADAM: ADAM,
}
"""File and function -> what models/ and megatron-core give by place, and by name."""


def source_of(place: str) -> ast.FunctionDef:
    """The definition, from the installed package; the test is skipped where it is absent."""
    file, _, qualname = place.partition(":")
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    path = next((Path(f) / inside for f in folders if (Path(f) / inside).is_file()), None)
    if path is None:
        pytest.skip(f"{package} is not installed, or has no {inside}")
    node: ast.AST = ast.parse(path.read_text())
    for name in qualname.split("."):
        [node] = [child for child in node.body if getattr(child, "name", "") == name]
    return node


@pytest.mark.parametrize("place", CALLS, ids=lambda place: place.replace("/", "."))
def test_calls_fit_the_package(place):
    arguments = source_of(place).args
    by_place, by_name = CALLS[place]
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    known = {*positional, *(argument.arg for argument in arguments.kwonlyargs)}
    assert tuple(positional[: len(by_place)]) == by_place
    assert set(by_name) <= known
    num_required = len(positional) - len(arguments.defaults)
    assert set(positional[:num_required]) <= {*by_place, *by_name, "self"}
