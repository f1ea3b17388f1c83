"""VERA, PVERA, RANDLORA, VBLORA and TINYLORA: matrices that all modules share stand once, at the root of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.peft.names import plain
from deltatune.formats.peft.table import Table, cut
from deltatune.formats.seats import Seat
from deltatune.methods.reparameterization.pvera import PVeRA
from deltatune.methods.reparameterization.rand_lora import RandLoRA
from deltatune.methods.reparameterization.tiny_lora import TinyLoRA
from deltatune.methods.reparameterization.vb_lora import VBLoRA
from deltatune.methods.reparameterization.vera import VeRA


def root(config: Config, held: Tensors, name: str) -> Tensor:
    """Return a matrix that stands at the root of the file; raises `DeltaTuneError` when it was not saved."""
    if name not in held:
        raise DeltaTuneError(
            f"the file beside {config.source} lacks {name}, the random matrix of all modules: it was saved with "
            "save_projection=False, and only peft's generator draws it again. Save it with save_projection=True."
        )
    return held[name]


def _corner(large: Tensor, small: Tensor) -> Tensor:
    """Return the beginning of a matrix in the shape of a smaller one."""
    for i, size in enumerate(small.shape):
        large = large.narrow(i, 0, size)
    return large


def _named(name: str, tensor: Tensor) -> Tensors:
    return {f"{name}_{'x'.join(map(str, tensor.shape))}": tensor.contiguous()}


class VeRAForm(Table):
    type = "VERA"
    methods = (VeRA,)
    transposed = True
    shared = ("vera_A", "vera_B")
    names = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    fields = frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"})
    kind: ClassVar[type[VeRA | PVeRA]] = VeRA

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = held[self.shared[1]].shape[1]
        agree(config, "r", site.path, rank, config.number("r", 256))
        return self.kind(rank, config.number("d_initial", 0.1))

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        A, B = (root(config, held, name) for name in self.shared)
        (part,) = super().read(config, site, held)
        part.leaves.update(_named("A", A[:, : site.d_in]) | _named("B", B[: site.d_out]))
        return [part]

    def share(self, seats: Sequence[Seat]) -> Tensors:
        sides = {"A": "the columns", "B": "the rows"}
        return {
            f"{self.type.lower()}_{side}": cut(seats, side, _corner, f"{what} of {side}")
            for side, what in sides.items()
        }

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        return {"r": method.rank, "d_initial": method.start, "save_projection": True, "projection_prng_key": 0}


class PVeRAForm(VeRAForm):
    """What is drawn while training stays behind: a loaded one computes with the means."""

    type = "PVERA"
    methods = (PVeRA,)
    kind = PVeRA
    shared = ("pvera_A", "pvera_B")
    names = {"d": "pvera_lambda_d", "b": "pvera_lambda_b"}
    needed = ("pvera_lambda_d", "pvera_lambda_b")
    fields = frozenset({"r", "projection_prng_key", "save_projection", "pvera_dropout", "d_initial", "generator_seed"})
    refused = {"sample_at_inference": "it draws noise outside training as well"}


class RandLoRAForm(Form):
    """peft lays its two factors out in different orders, so an entry of B stands at another place."""

    type = "RANDLORA"
    methods = (RandLoRA,)
    transposed = True
    shared = ("randlora_A", "randlora_B")
    repeats = True
    suffixes = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    needed = ("randlora_lambda", "randlora_gamma")
    fields = frozenset(
        ["r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection", "sparse", "very_sparse"]
    )

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        rank, n = held["randlora_lambda"].shape
        agree(config, "r", site.path, rank, config.number("r", 32))
        small, large = sorted((site.d_in, site.d_out))
        A, T = root(config, held, "randlora_A")[:, 0, :small], root(config, held, "randlora_B")[:large, :n]
        B = T.reshape(large, rank, n).permute(2, 0, 1)
        leaves = {"l": held["randlora_lambda"].mT, "g": held["randlora_gamma"], **_named("A", A), **_named("B", B)}
        return [Part(site.path, RandLoRA(rank, float(config.number("randlora_alpha", 640))), leaves)]

    def write(self, seat: Seat) -> Tensors:
        return {"randlora_lambda": seat.leaves["l"].mT, "randlora_gamma": seat.leaves["g"]}

    def share(self, seats: Sequence[Seat]) -> Tensors:
        turned = [{**seat.leaves, **_turned(seat)} for seat in seats]
        ours = [Seat(seat.method, seat.site, leaves, seat.own) for seat, leaves in zip(seats, turned, strict=True)]
        return {
            "randlora_A": cut(ours, "A", _corner, "the columns of A")[:, None],
            "randlora_B": cut(ours, "B", _corner, "the rows of B"),
        }

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        alpha = 20 * method.rank if method.alpha is None else plain(method.alpha)
        return {"r": method.rank, "randlora_alpha": alpha, "save_projection": True, "projection_prng_key": 0}


def _turned(seat: Seat) -> Tensors:
    """Return B as peft lays it out, [large, n, rank]."""
    name, B = next((name, t) for name, t in seat.leaves.items() if name.startswith("B_"))
    n, large, rank = B.shape
    return {name: B.permute(1, 2, 0).reshape(large, n, rank)}


class VBLoRAForm(Table):
    type = "VBLORA"
    methods = (VBLoRA,)
    transposed = True
    shared = ("vblora_vector_bank",)
    names = {"A": "vblora_logits_A", "B": "vblora_logits_B", "v": "vblora_vector_bank"}
    needed = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    fields = frozenset(
        ["r", "num_vectors", "vector_length", "topk", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"]
    )
    refused = {"save_only_topk_weights": "the largest logits alone are no whole start for training; save all"}

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        (vectors, size), rank = held["vblora_vector_bank"].shape, held["vblora_logits_A"].shape[0]
        agree(config, "r", site.path, rank, config.number("r", 4))
        return VBLoRA(rank, vectors, size, config.whole("topk", 2))

    def write(self, seat: Seat) -> Tensors:
        for width in (seat.site.d_in, seat.site.d_out):
            if width % seat.method.size:
                raise DeltaTuneError(
                    f"peft's VBLORA needs widths that its vectors' size divides; {seat.method} at {seat.site.path!r} has {width}."
                )
        return {name: tensor for name, tensor in super().write(seat).items() if name not in self.shared}

    def share(self, seats: Sequence[Seat]) -> Tensors:
        return {"vblora_vector_bank": seats[0].leaves["v"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        sizes = {"num_vectors": method.vectors, "vector_length": method.size, "topk": method.top}
        return {"r": method.rank, **sizes, "save_only_topk_weights": False}


class TinyLoRAForm(Table):
    """Which vector a module has is counted in the order of the model's modules."""

    type = "TINYLORA"
    methods = (TinyLoRA,)
    shared = ("tinylora_v",)
    names = {
        "A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P", "v": "tinylora_v",
    }  # fmt: skip
    needed = ("tinylora_A", "tinylora_B")
    fields = frozenset(["r", "u", "weight_tying", "projection_seed", "init_v_bound", "tinylora_dropout"]) | {
        "save_projection"
    }

    def spread(self, config: Config, held: Mapping[str, Tensors], shared: Tensors) -> dict[str, Tensors]:
        groups = max(1, round(len(held) * (1 - config.number("weight_tying", 0.0))))
        size, found = max(1, len(held) // groups), {}
        for i, (path, own) in enumerate(held.items()):
            name = f"tinylora_v.{min(i // size, groups - 1)}"
            found[path] = own | {"tinylora_v": root(config, shared, name)}
        return found

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        root(config, held, "tinylora_P")
        rank = held["tinylora_A"].shape[0]
        agree(config, "r", site.path, rank, config.number("r", 2))
        tied = config.number("weight_tying", 0.0) == 1
        return TinyLoRA(rank, len(held["tinylora_v"]), "delta" if tied else "site")

    def write(self, seat: Seat) -> Tensors:
        return {name: tensor for name, tensor in super().write(seat).items() if name not in self.shared}

    def share(self, seats: Sequence[Seat]) -> Tensors:
        one = self.one(seats).share == "delta"
        return {f"tinylora_v.{i}": seat.leaves["v"] for i, seat in enumerate(seats[:1] if one else seats)}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        tying = 1.0 if method.share == "delta" else 0.0
        return {"r": method.rank, "u": method.size, "weight_tying": tying, "save_projection": True}
