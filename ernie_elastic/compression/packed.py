"""Run-time modules whose weights stay compressed in memory: linear layers, embeddings and stacks of experts.

Contract: a packed module gives the bits that the dense one gives (kernel "decode": decode, then the same product), and
no dense copy of its weight outlives its forward unless a gradient is wanted. kernel "fused" decodes inside the product:
another summation order, so it is never chosen unless asked for. The modules know nothing of files; `quantizer.py`
fills them.

Legend: E experts, R rows (outputs), C columns (inputs), M rows of the activations, N looked-up rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from ernie_elastic.compression.config import KERNELS
from ernie_elastic.compression.resident import Resident, TileLayout, fused_experts, layout_for
from ernie_elastic.errors import ConfigError, FormatError

PACKED_EXPERTS = "ernie_elastic_packed"
BUFFER_PREFIX = "tbe__"
LOW_BUFFER = f"{BUFFER_PREFIX}low"


class PackedTensor(nn.Module):
    """A BF16 weight [R, C] or stack [E, R, C] in the run-time layout of its device, as integer buffers.

    It stands where a parameter stood: `packed[e]` is the dense matrix of expert e in the compute dtype, and torch
    functions that get the whole of it get it decoded. The compute dtype follows `.to(dtype)`; a move to a device of
    another kind packs anew. parts: matrices of each expert below each other (2: a gate and an up projection).
    """

    def __init__(self, shape: tuple[int, ...], parts: int = 1) -> None:
        super().__init__()
        self.stack_shape = tuple(shape)
        self.parts = parts
        self.kernel = "decode"
        self._is_hf_initialized = True  # an initialiser has nothing to do here
        self._layout = layout_for(torch.device("cpu"))
        self._resident: Resident | None = None
        self._low: torch.Tensor | None = None
        # Holds the compute dtype: module-wide casts reach buffers. It has one element, by which the quantizer tells the
        # size of a weight that is not read yet.
        self.register_buffer("compute", torch.zeros(()), persistent=False)

    @classmethod
    def standing_for(cls, key: str, shape: tuple[int, ...]) -> PackedTensor:
        """An empty one for the model key `key`, whose weight is [R, C] or [E, R, C]."""
        halves = len(shape) == 3 and key.endswith("gate_up_proj") and shape[-2] % 2 == 0
        return cls(shape, parts=2 if halves else 1)

    @property
    def shape(self) -> torch.Size:
        """[R, C] or [E, R, C] of the dense weight."""
        return torch.Size(self.stack_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: what `decode` gives unless told otherwise."""
        return self.compute.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed arrays lie."""
        return self.compute.device

    def fill(
        self,
        weight: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: type[Resident] | None = None,
    ) -> None:
        """Pack a BF16 weight [R, C] or [E, R, C] on `device` and keep only the packed arrays.

        layout: of another kind of device (for tests). FormatError for another shape.
        """
        if tuple(weight.shape) != self.stack_shape:
            raise FormatError(f"packed weight: got shape {tuple(weight.shape)}, expected {self.stack_shape}")
        device = torch.device(device)
        self._layout = layout or layout_for(device)
        packed = self._layout.pack(weight.to(device), self.parts)
        for name in self._arrays():
            delattr(self, f"{BUFFER_PREFIX}{name}")
        for name, tensor in packed.tensors.items():
            self.register_buffer(f"{BUFFER_PREFIX}{name}", tensor)
        self.compute = torch.zeros((), dtype=dtype, device=device)
        self._resident = None

    def _arrays(self) -> dict[str, torch.Tensor]:
        return {name.removeprefix(BUFFER_PREFIX): t for name, t in self.named_buffers() if name != "compute"}

    @property
    def resident(self) -> Resident:
        """The packed weight [R, C] or [E, R, C] over the buffers of this module. FormatError before `fill`."""
        low = self._buffers.get(LOW_BUFFER)
        # Buffers may be replaced behind this module's back, by hooks that move them or by load_state_dict(assign=True).
        if self._resident is None or low is not self._low:
            arrays = self._arrays()
            if not arrays:
                raise FormatError(f"packed weight {self.stack_shape} was never filled; load it with from_pretrained")
            self._resident, self._low = self._layout.of(self.stack_shape, self.parts, arrays), low
        return self._resident

    def decode(self, expert: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight, or [R, C] of one expert, in `dtype` (default: the compute dtype); exact unless float16.

        IndexError for an expert outside of the stack.
        """
        dtype = dtype or self.dtype
        if expert is not None:
            count = self.stack_shape[0]
            if not -count <= expert < count:
                raise IndexError(f"expert {expert} of a stack of {count}")
            expert %= count
        return self.resident.dense(expert, _exact(dtype)).to(dtype)

    def product(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """x [..., C] times the transposed weight (of one expert): [..., R] in x's dtype, by this weight's kernel."""
        # The fused products are not differentiable: where x wants its gradient, the weight is decoded.
        if self.kernel == "decode" or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.decode(expert, x.dtype))
        resident = self._resident  # a decoding step calls this dozens of times: the property only where it must
        if resident is None or self._buffers[LOW_BUFFER] is not self._low:
            resident = self.resident
        return resident.product(x, expert)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by index, int64 [...] -> [..., C] in the compute dtype; only those rows are decoded."""
        found_NC = self.resident.look_up(rows.reshape(-1), _exact(self.dtype)).to(self.dtype)
        return found_NC.reshape(*rows.shape, self.stack_shape[-1])

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool:
            index = int(index)
        if isinstance(index, int) and len(self.stack_shape) == 3:
            return self.decode(index)
        return self.decode()[index]

    def __len__(self) -> int:
        return self.stack_shape[0]

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size, of the dense weight's shape."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch functions that are given the packed weight itself see it decoded, for the length of the call."""
        args, kwargs = tree_map(lambda item: item.decode() if isinstance(item, cls) else item, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedTensor:
        before, left = layout_for(self.device), self.device
        self._resident = None  # its arrays may move
        super()._apply(fn, recurse)
        real = "meta" not in (left.type, self.device.type)
        if real and layout_for(self.device) is not before and self._arrays():
            self.fill(self.decode(dtype=torch.bfloat16), self.dtype, self.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._resident = None  # arrays that were written in place are checked anew before anything reads them

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{list(self.stack_shape)}, kernel={self.kernel}"


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What a weight is decoded to before it is cast to `dtype`."""
    return dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight [R, C]; several may share one PackedTensor (tied weights)."""

    bias: nn.Parameter | None

    def __init__(self, dense: nn.Linear, packed: PackedTensor) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.packed = packed
        self.register_parameter("bias", dense.bias)
        # Nothing here is for an initialiser: the bias is in the checkpoint (quantizer.py checks it).
        self._is_hf_initialized = True

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy [R, C] in the compute dtype, for code that reads it directly."""
        return self.packed.decode()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., R]; with kernel "decode" the bits of nn.Linear."""
        packed, bias = self.packed, self.bias
        if packed.kernel == "decode":
            return F.linear(x, packed.decode(dtype=x.dtype), bias)
        out = packed.product(x)
        return out if bias is None else out + bias


class PackedEmbedding(nn.Module):
    """nn.Embedding with a packed table [R, C]: only the rows that are looked up are decoded."""

    def __init__(self, dense: nn.Embedding, packed: PackedTensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx
        self.packed = packed
        self._is_hf_initialized = True

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy [R, C] in the compute dtype, for code that reads it directly."""
        return self.packed.decode()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., C]; the bits of nn.Embedding."""
        return self.packed.look_up(index)


def packable(module: nn.Module, attribute: str) -> bool:
    """Whether the parameter `attribute` of `module` can stay packed: how a model opts in.

    Yes for the weight of nn.Linear and nn.Embedding themselves (not of subclasses, whose forward is unknown), and for
    3-D parameters [E, R, C] of modules that hold experts (`num_experts` = E >= 2, or a class named ...Experts): those
    are used one expert at a time. Other parameters load dense.
    """
    parameter = module._parameters.get(attribute)
    if parameter is None or parameter.numel() == 0:
        return False
    if type(module) is nn.Linear or type(module) is nn.Embedding:
        limited = isinstance(module, nn.Embedding) and module.max_norm is not None
        return attribute == "weight" and not limited
    holds_experts = getattr(module, "num_experts", None) == parameter.shape[0] or "Experts" in type(module).__name__
    return parameter.ndim == 3 and parameter.shape[0] >= 2 and holds_experts


def install(parent: nn.Module, name: str, module: nn.Module, attribute: str, packed: PackedTensor) -> None:
    """Put `packed` where `module.attribute` (child `name` of `parent`) holds its weight."""
    if isinstance(module, nn.Linear):
        setattr(parent, name, PackedLinear(module, packed))
    elif isinstance(module, nn.Embedding):
        setattr(parent, name, PackedEmbedding(module, packed))
    else:
        del module._parameters[attribute]
        module.add_module(attribute, packed)
        if not any(True for _ in module.parameters(recurse=False)):
            module._is_hf_initialized = True  # type: ignore[assignment]
        config = getattr(module, "config", None)
        if config is not None and hasattr(type(module).forward, "__wrapped__"):
            config._experts_implementation = PACKED_EXPERTS


def packed_experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """The experts back end of a packed model: only routed experts are decoded, one at a time, in increasing order.

    hidden_states [M, C], top_k_index int64 [M, K], top_k_weights [M, K] -> [M, C]. kernel "decode" runs the class's own
    loop on decoded experts, so its bits are those of the dense loop; so does a call that wants gradients. "fused" needs
    gate half first, no biases and no transposed weights; raises ConfigError otherwise.
    """
    weights = [child for child in module.children() if isinstance(child, PackedTensor)]
    wanted = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    if wanted or all(weight.kernel == "decode" for weight in weights):
        return inspect.unwrap(type(module).forward)(module, hidden_states, top_k_index, top_k_weights, *rest)
    check_fusable(module)
    if len(weights) == 2 and _is_plain_swiglu(module):
        gate_up, down = (getattr(module, name).resident for name in ("gate_up_proj", "down_proj"))
        in_one_call = fused_experts(hidden_states, gate_up, down, top_k_index, top_k_weights)
        if in_one_call is not None:
            return in_one_call
    output = torch.zeros_like(hidden_states)
    count = len(module.down_proj)  # type: ignore[arg-type]
    for expert in top_k_index.unique().tolist():
        if expert >= count:  # Transformers' mark for a token whose expert lies on another rank
            continue
        token, slot = torch.where(top_k_index == expert)
        gate_up = _product(module.gate_up_proj, hidden_states[token], expert)
        hidden = _product(module.down_proj, module._apply_gate(gate_up), expert)  # type: ignore[operator]
        output.index_add_(0, token, (hidden * top_k_weights[token, slot, None]).to(output.dtype))
    return output


def _is_plain_swiglu(module: nn.Module) -> bool:
    """Whether the experts compute silu(gate) * up, by Transformers' own gate and activation."""
    gate, default = getattr(type(module), "_apply_gate", None), getattr(moe, "_default_apply_gate", None)
    plain = gate is not None and gate is default
    return plain and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)


def check_fusable(module: nn.Module) -> None:
    """ConfigError when kernel "fused" cannot run an experts module: it knows one layout of weights only."""
    odd = [name for name in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, name, False)]
    odd += [name for name in ("has_gate", "is_concatenated") if not getattr(module, name, True)]
    if odd or not hasattr(module, "_apply_gate"):
        raise ConfigError(
            f"kernel 'fused' cannot run {type(module).__name__} ({', '.join(odd) or 'its forward is its own'}); "
            "choose 'decode'"
        )


def _product(weight: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    return weight.product(x, expert) if isinstance(weight, PackedTensor) else F.linear(x, weight[expert])


def set_kernel(model: nn.Module, kernel: str) -> int:
    """Choose "decode" (bit-equal) or "fused" for every packed weight of a model; returns how many there are.

    Raises ConfigError for another name, for a model without packed weights, and where "fused" cannot run the experts.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel {kernel!r} is not known; choose {' or '.join(KERNELS)}")
    weights = [module for module in model.modules() if isinstance(module, PackedTensor)]
    if not weights:
        raise ConfigError("set_kernel: the model holds no packed weight; load it from a compressed directory")
    for module in model.modules():
        stacks = [child for child in module.children() if isinstance(child, PackedTensor) and len(child.shape) == 3]
        if kernel == "fused" and stacks:
            check_fusable(module)
            if isinstance(stacks[0].resident, TileLayout) and not (len(stacks) == 2 and _is_plain_swiglu(module)):
                raise ConfigError(
                    f"kernel 'fused' on a GPU runs SwiGLU experts only, not {type(module).__name__}; choose 'decode'"
                )
    for weight in weights:
        if kernel == "fused" and isinstance(weight.resident, TileLayout) and weight.dtype != torch.bfloat16:
            raise ConfigError(
                f"kernel 'fused' on a GPU computes in bfloat16, the model in {weight.dtype}; load it with "
                "dtype=torch.bfloat16, or choose 'decode'"
            )
    for weight in weights:
        weight.kernel = kernel
    return len(weights)


def resident_weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they lie in memory; shared storage counts once."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        key = (str(tensor.device), tensor.data_ptr())
        seen[key] = max(seen.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())
