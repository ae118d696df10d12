"""zip_moe: the fused kernels have the bits of their plain BF16 twin, and every path has the values of the definition.

Letters: N tokens, K chosen, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import sorted_experts, zip_moe
from ernie_elastic.kernels.zip_moe import decoded
from tests.kernels.compare import any_words, gaussian, same_bits, same_values

# (N, E, K, H, I): odd sizes; fewer pairs than experts; more pairs of an expert than a tile; one of each; whole tiles.
SHAPES = [(5, 6, 2, 72, 40), (1, 9, 4, 64, 130), (37, 3, 2, 65, 8), (3, 1, 1, 7, 5), (8, 4, 3, 128, 64)]
FEW = SHAPES[:3]


def make(
    shape: tuple[int, ...], weights: Callable[..., Tensor] = gaussian, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, ...]:
    """x, gate_up, down, ids without repetition in a token, combine weights."""
    tokens, experts, top_k, hidden, width = shape
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    combine = torch.rand(tokens, top_k, generator=generator)
    gate_up, down = weights(experts, 2 * width, hidden, seed=seed), weights(experts, hidden, width, seed=seed + 1)
    x = gaussian(tokens, hidden, seed=seed + 2, scale=1.0)
    return tuple(tensor.to(device) for tensor in (x, gate_up, down, ids, combine))


def exact(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, combine: Tensor) -> Tensor:
    """The layer in float64, by an independent definition that rounds nothing."""
    from ernie_elastic.kernels.sorted_experts.reference import sorted_experts as definition

    return definition(x.double(), gate_up.double(), down.double(), ids, combine.double())


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities in the interpreter's numpy
@pytest.mark.parametrize(
    ("weights", "shape"),
    [*((gaussian, shape) for shape in SHAPES), (any_words, SHAPES[4]), *(
        pytest.param(any_words, shape, marks=pytest.mark.slow) for shape in SHAPES[:4]
    )],
    ids=lambda item: getattr(item, "__name__", str(item)),
)  # fmt: skip
def test_fused_experts_have_the_bits_of_the_plain_twin(
    weights: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, stress: int
) -> None:
    from ernie_elastic.kernels.zip_moe.triton_impl import Tiles

    x, gate_up, down, ids, combine = make(shape, weights, device)
    packed = zip_moe.pack(gate_up, down)
    both = stress > 1 or device.type == "cuda" or shape == SHAPES[0]
    for tiles in (Tiles(16, 1), Tiles(8, 3)) if shape in FEW and both else (Tiles(16, 2),):
        found = zip_moe.experts_fused(x, packed, ids, combine, tiles)
        assert same_values(found, zip_moe.experts_plain(x, gate_up, down, ids, combine, tiles))
        if weights is gaussian:
            assert relative(found, exact(x, gate_up, down, ids, combine)) < 6e-3


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 2, 8, 8)], ids=str)
def test_reference_and_decoded_path_have_the_values_of_the_definition(shape: tuple[int, ...]) -> None:
    x, gate_up, down, ids, combine = make(shape)
    packed = zip_moe.pack(gate_up, down)
    wanted = exact(x, gate_up, down, ids, combine)
    for found, limit in (
        (zip_moe.experts(x, packed, ids, combine), 3e-3),
        (zip_moe.experts_decoded(x, packed, ids, combine), 1e-2),
    ):
        assert found.dtype == torch.bfloat16 and found.shape == x.shape
        assert not x.shape[0] or relative(found, wanted) < limit


@pytest.mark.parametrize("weights", [gaussian, any_words])
def test_packed_experts_give_back_the_bits(weights: Callable[..., Tensor]) -> None:
    _, gate_up, down, _, _ = make((1, 5, 2, 72, 40), weights)
    packed = zip_moe.pack(gate_up, down)
    assert packed.num_experts == 5
    for found, wanted in zip(zip_moe.unpack(packed), (gate_up, down), strict=True):
        assert same_bits(found, wanted)
    for found, wanted in zip(zip_moe.unpack(packed, [4, 1]), (gate_up, down), strict=True):
        assert same_bits(found, wanted[[4, 1]])


def test_size_is_that_of_the_dense_planes() -> None:
    packed = zip_moe.pack(gaussian(4, 256, 128), gaussian(4, 128, 128, seed=1))
    assert 8 * packed.nbytes / (4 * 384 * 128) < 11.4


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "experts", "top_k", "size"), [(1, 64, 8, 16), (40, 4, 8, 16), (9, 200, 6, 8)])
def test_plan_gives_every_pair_one_slot(tokens: int, experts: int, top_k: int, size: int, device: torch.device) -> None:
    from ernie_elastic.kernels.zip_moe import triton_impl

    ids = torch.randint(-1, experts + 1, (tokens, top_k))  # repetitions and ids of other ranks among them
    pair_of_slot, expert_of_block = (part.cpu() for part in triton_impl.plan(ids.to(device), experts, size))
    blocks: list[int] = []
    slots: list[int] = []
    for expert in range(experts):
        pairs = torch.where(ids.flatten() == expert)[0].tolist()
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            blocks.append(expert)
            slots += part + [ids.numel()] * (size - len(part))
    assert expert_of_block.tolist() == blocks + [-1] * (expert_of_block.numel() - len(blocks))
    assert pair_of_slot[: len(slots)].tolist() == slots


@pytest.mark.interpreter
@pytest.mark.parametrize("path", ["reference", "triton", "decoded"])
def test_ids_of_other_ranks_contribute_nothing(path: str, device: torch.device) -> None:
    x, gate_up, down, ids, combine = make((6, 5, 3, 40, 24), device=device)
    packed = zip_moe.pack(gate_up, down)
    away = ids.clone()
    away[2, 1], away[4] = 5, torch.tensor([-1, 7, 5])
    combine_0 = combine * ((away >= 0) & (away < 5))
    run = zip_moe.experts_decoded if path == "decoded" else lambda *rest: zip_moe.experts(*rest, path)
    found = run(x, packed, away, combine)
    assert same_bits(found[4], torch.zeros_like(found[4]))
    assert relative(found, exact(x, gate_up, down, ids, combine_0)) < 6e-3


@pytest.mark.interpreter
def test_fused_up_to_the_threshold_and_decoded_above(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate_up, down, ids, combine = make((5, 4, 2, 16, 8), device=device)
    packed = zip_moe.pack(gate_up, down)
    asked: list[list[int]] = []
    unpack = zip_moe.unpack
    monkeypatch.setattr(zip_moe, "unpack", lambda packed, group: asked.append(group) or unpack(packed, group))
    monkeypatch.setattr(zip_moe, "FUSED_MAX_TOKENS", 5)
    zip_moe.experts(x, packed, ids, combine, "triton")
    assert not asked
    monkeypatch.setattr(zip_moe, "FUSED_MAX_TOKENS", 4)
    monkeypatch.setattr(decoded, "DECODED_EXPERTS", 2)
    ids[ids == 1] = 9  # nobody is routed to expert 1
    zip_moe.experts(x, packed, ids, combine, "triton")
    assert asked == [[0, 2], [3]]


@pytest.mark.interpreter
def test_no_tokens_are_no_work(device: torch.device) -> None:
    x, gate_up, down, ids, combine = make((0, 4, 2, 16, 8), device=device)
    assert zip_moe.experts(x, zip_moe.pack(gate_up, down), ids, combine, "triton").shape == (0, 16)


def test_agrees_with_the_experts_of_training() -> None:
    x, gate_up, down, ids, combine = make((9, 4, 2, 24, 16))
    trained = sorted_experts.sorted_experts(x.float(), gate_up.float(), down.float(), ids, combine)
    assert relative(zip_moe.experts(x, zip_moe.pack(gate_up, down), ids, combine), trained.double()) < 3e-3


def test_wrong_inputs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate_up, down, ids, combine = make((5, 4, 2, 16, 8))
    packed = zip_moe.pack(gate_up, down)
    for bad in ((gate_up.float(), down), (gate_up[:, 1:], down), (gate_up, down[0])):
        with pytest.raises(ConfigError, match=r"expected bfloat16 \[E, 2I, H\] and \[E, H, I\]"):
            zip_moe.pack(*bad)
    for x_bad, ids_bad in ((x.float(), ids), (x[:, 1:], ids), (x, ids.int()), (x, ids[1:])):
        for run in (zip_moe.experts, zip_moe.experts_fused, zip_moe.experts_decoded):
            with pytest.raises(ConfigError, match=r"expected bfloat16 \[N, 16\], int64"):
                run(x_bad, packed, ids_bad, combine)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="the tensors are on cpu"):
        zip_moe.experts(x, packed, ids, combine, "triton")
