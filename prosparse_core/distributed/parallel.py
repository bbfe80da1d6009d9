"""One model in several processes: DDP (everyone holds it whole) or FSDP2 (everyone holds a shard of each weight).

Both leave the mathematics alone: gradients are averaged, so that a loss is multiplied by the number of processes, and
the weights a forward pass sees are those that one process would see. Under FSDP2 with bf16 autocast, weights travel as
bf16, which is what autocast would round them to; norms, which autocast leaves in fp32, travel in fp32.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prosparse_core.distributed.ranks import Ranks
from prosparse_core.document_masks import forward_arguments
from prosparse_core.errors import ProSparseError
from prosparse_core.families import find_ffns
from prosparse_core.precision import Precision


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of a known family, in order."""
    return list(model.get_submodule(find_ffns(model)[0].family.layers).children())


def compile_layers(model: nn.Module) -> None:
    """torch.compile each layer (in place, at its first pass): layers of one shape share what is compiled."""
    for layer in layers_of(model):
        layer.compile()


def shard(model: nn.Module, precision: Precision) -> None:
    """Split every weight of ``model`` (in place) over all processes, gathered layer by layer when needed (FSDP2)."""
    from torch import distributed
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    layer = whole
    if precision == "bf16":
        layer = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        norms = [
            m for m in model.modules() if (own := list(m.parameters(recurse=False))) and max(p.ndim for p in own) < 2
        ]
        fully_shard(norms, mp_policy=whole, reshard_after_forward=False)
    for module in layers_of(model):
        fully_shard(module, mp_policy=layer)
    fully_shard(model, mp_policy=whole)
    if "nccl" not in str(distributed.get_backend()):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot average


class Forward:
    """Calls the model in one process of several: averages gradients over all of them in the step's last backward."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._plain, self._model = model, model
        self._is_ddp = ranks.size > 1 and not is_sharded(model)
        if self._is_ddp:
            self._model = nn.parallel.DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def __call__(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab] of ``tokens`` [B, T]; ``positions`` as in :mod:`prosparse_core.document_masks`."""
        more = forward_arguments(self._plain, positions)
        return self._model(input_ids=tokens, use_cache=False, **more).logits

    def accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        """Around each pass of a step and its backward. FSDP reduces after every pass: whole gradients do not fit."""
        if self._is_ddp and not is_last:
            return self._model.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()

    def settle(self, tokens: Tensor) -> None:
        """One pass whose gradients are thrown away.

        After its first backward DDP sorts gradients into other buckets, which changes the order in which more than two
        processes add them up: done before the first step, a resumed stage rounds as an uninterrupted one.
        """
        if not self._is_ddp:
            return
        state = torch.get_rng_state()
        self(tokens[:1]).float().mean().backward()
        self._model.zero_grad(set_to_none=True)
        torch.set_rng_state(state)


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by its name, tied ones once; sharded ones as they are."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def whole(tensor: Tensor, ranks: Ranks) -> Tensor | None:
    """All of a tensor, on rank 0 in CPU memory; None elsewhere. Every process must call."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if not ranks.is_first:
        return None
    full = full.detach().cpu()
    # a gathered tensor may be a view of one that is padded to equal shards, and would be saved with it
    return full if full.untyped_storage().nbytes() == full.nbytes else full.clone()


def part_of(full: Any, like: Tensor) -> Tensor:
    """What this process holds of ``full`` (a tensor, or a slice of a file), distributed as ``like`` is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(like, DTensor):
        return full if isinstance(full, Tensor) else full[:]
    mesh = like.device_mesh
    shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, like.placements)
    if 0 in shape:  # more processes than rows: nothing is left for this one
        local = torch.empty(shape, device=mesh.device_type, dtype=like.dtype)
    else:
        local = full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        local = local.to(mesh.device_type, like.dtype, copy=True)
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def read_shards(model: nn.Module, folder: Path) -> None:
    """Give a sharded model without weights those of a Hugging Face folder; each process reads its own part only.

    Raises:
        ProSparseError: the folder lacks a weight of the model.
    """
    with _Weights(folder) as files:
        made: dict[int, nn.Parameter] = {}
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(parameter) not in made:
                    full = files.find(aliases[id(parameter)])
                    if list(full.get_shape()) != list(parameter.shape):
                        raise ProSparseError(
                            f"{folder}: {aliases[id(parameter)][0]} is {full.get_shape()}, not {list(parameter.shape)}"
                        )
                    made[id(parameter)] = nn.Parameter(part_of(full, parameter), parameter.requires_grad)
                module._parameters[key] = made[id(parameter)]


class _Weights:
    """The safetensors files of a model folder, read by slices."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Weights:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def find(self, names: list[str]) -> Any:
        name = next((n for n in names if n in self._files), None)
        if name is None:
            raise ProSparseError(
                f"{self._folder} has no weight named {' or '.join(names)}",
                hint="runtime.parallel=ddp loads the model whole, as transformers does",
            )
        return self._files[name].get_slice(name)

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
