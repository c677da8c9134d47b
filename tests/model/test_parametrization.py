"""The parametrizations against CompleteP's table 1 (arXiv 2505.01618), written out below, and against identities that must hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.huggingface import BurnishForCausalLM, transformers_config
from model.linear_cross_entropy import FrozenHead
from model.parametrization import initialize, owned_parameters
from model.transformer import Transformer
from training.optimizers import make_optimizer, parameter_groups
from training.recipe import OptimizerSection

BASE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "vocab_size": 61, "sequence_length": 16, "init_std": 0.1}
LARGE: dict[str, Any] = {**BASE, "width": 128, "depth": 6, "heads": 8}  # m_N = 4, m_L = 3
BLOCKS: list[dict[str, Any]] = [
    {},
    {"block": "post_norm", "positions": "learned", "biases": "all"},
    {"block": "outlier_protected"},
    {"block": "outlier_protected", "attention": "shaped", "residual_gain_form": "vector"},
    {"attention": "shaped", "tied_embeddings": False},
    {"block": "simplified", "activation": "relu"},
    {"block": "simplified_parallel", "norm_places": []},
]
PARAMETRIZATIONS = {"mup": 0.0, "depth_mup": 0.5, "complete_p": 1.0}
# simplified blocks add one branch, so no rule for depth is theirs
CASES = [(p, f) for p in PARAMETRIZATIONS for f in BLOCKS if p == "mup" or "simplified" not in f.get("block", "")]


def with_base(parametrization: str) -> dict[str, Any]:
    depth = {} if parametrization == "mup" else {"base_depth": BASE["depth"]}
    return {"parametrization": parametrization, "base_width": BASE["width"], **depth}


def make(**fields: Any) -> Transformer:
    model = Transformer(ModelConfig(**fields))
    initialize(model, 0)
    return model


def train(model: Transformer, kind: str, steps: int = 3, **section: Any) -> list[float]:
    """Steps of the base optimizer, and the loss before each."""
    optimizer = make_optimizer(model, OptimizerSection.model_validate({"kind": kind, "learning_rate": 1e-2, **section}))
    losses = []
    for step in range(steps):
        tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("parametrization", "fields"), CASES)
def test_base_size_is_the_standard_one_bit_for_bit(fields: dict[str, Any], parametrization: str) -> None:
    standard, ours = make(**BASE, **fields), make(**BASE, **fields, **with_base(parametrization))
    assert train(ours, "adamw") == train(standard, "adamw")
    for (name, a), b in zip(standard.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["adafactor", "muon", "soap"])
def test_base_size_is_the_standard_one_for_every_optimizer(kind: str) -> None:
    standard, ours = make(**BASE, block="outlier_protected"), make(**BASE, block="outlier_protected", **with_base("complete_p"))
    section = OptimizerSection.model_validate({"kind": kind})
    for name, group in parameter_groups(ours, section).items():
        theirs = parameter_groups(standard, section)[name]
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


def row_of(name: str, module: nn.Module) -> str:
    """Which row of the table a parameter belongs to."""
    if name.startswith("blocks."):
        return "hidden" if isinstance(module, nn.Linear) and name.endswith("weight") else "block vectors"
    return "embeddings" if name in ("embedding.weight", "unembedding.weight") else "outside vectors"


@pytest.mark.parametrize(("parametrization", "fields"), CASES)
def test_every_tensor_learns_as_the_table_says(fields: dict[str, Any], parametrization: str) -> None:
    n, length, alpha = 4.0, 1.0 if parametrization == "mup" else 3.0, PARAMETRIZATIONS[parametrization]
    by_depth = length ** (alpha - 1) if alpha else 1.0
    table = {  # row: learning rate, weight decay, epsilon
        "embeddings": (1.0, 1.0, 1 / n),
        "outside vectors": (1.0, 0.0, 1 / n),
        "hidden": (by_depth / n, n, length**-alpha / n),
        "block vectors": (by_depth, 0.0, length**-alpha / n),
    }
    model = make(**LARGE, **fields, **with_base(parametrization))
    section = OptimizerSection(learning_rate=0.1, weight_decay=0.3, epsilon=1e-6)
    group_of = {id(p): group for group in parameter_groups(model, section).values() for p in group["params"]}
    for name, module, parameter in owned_parameters(model):
        rate, decay, epsilon = table[row_of(name, module)]
        group = group_of[id(parameter)]
        assert group["lr_factor"] == pytest.approx(rate), name
        assert group["lr"] == pytest.approx(0.1 * rate), name
        assert group["weight_decay"] == pytest.approx(0.3 * decay), name
        assert group["eps"] == pytest.approx(1e-6 * epsilon), name


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon", "soap"])
def test_a_step_moves_hidden_weights_as_its_width_demands_whatever_the_optimizer(kind: str) -> None:
    """What the factor on the learning rate is for: one step, from the same gradient statistics, four times as wide and three as deep.

    Root mean square of the update, without decay: m_N^-1 m_L^(alpha-1) of the base's. Adafactor's steps are in proportion to the weights,
    which begin m_N^-1/2 smaller: it must not count that twice. Muon's are orthogonal: it is the spectral norm that has to stay, but for the
    depth's factor, and so the root mean square to fall by m_N^-1/2.
    """

    def moved(**fields: Any) -> dict[str, tuple[float, float]]:
        model = make(**fields, tied_embeddings=False, norm="rms_norm")
        section = OptimizerSection.model_validate({"kind": kind, "learning_rate": 1e-2, "weight_decay": 0.0})
        optimizer = make_optimizer(model, section, sharded=False)
        optimizer.ready = True  # pyright: ignore[reportAttributeAccessIssue]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(2):  # SOAP's first step only looks
            generator = torch.Generator().manual_seed(step)
            for name, parameter in model.named_parameters():
                scale = 1.0 if name.startswith("blocks.") else 3.0
                parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        steps = {name: p.detach() - before[name] for name, p in model.named_parameters() if p.ndim == 2}
        return {name: (step.square().mean().sqrt().item(), torch.linalg.matrix_norm(step, 2).item()) for name, step in steps.items()}

    base, large = moved(**BASE), moved(**LARGE, **with_base("depth_mup"))
    for name in ("blocks.0.attention.query.weight", "blocks.1.mlp.up.weight"):
        root_mean_square, spectral = (a / b for a, b in zip(large[name], base[name], strict=True))
        assert root_mean_square == pytest.approx((1 / 2 if kind == "muon" else 1 / 4) / math.sqrt(3), rel=0.1), name
        if kind == "muon":
            assert spectral == pytest.approx(1 / math.sqrt(3), rel=0.1), name


def test_epsilon_follows_the_gradients_of_every_tensor() -> None:
    """The first update over its learning rate, from real gradients, at an epsilon of their size: the same at 8 times the width.

    |g| / (|g| + epsilon) tells whether epsilon was scaled as the gradient is, for what lies outside the blocks too. (But the final norm,
    whose first gradient is mostly that of the first logits' own size, which falls with the width: `test_every_tensor` has it.)
    """

    def first_update(width: int, parametrization: str) -> dict[str, float]:
        fields: dict[str, Any] = {**BASE, "width": width, "heads": width // 16, "tied_embeddings": False, "positions": "learned"}
        model = make(**{**fields, **with_base(parametrization)})
        section = OptimizerSection(learning_rate=1e-3, weight_decay=0.0, epsilon=1e-3)
        optimizer = make_optimizer(model, section, sharded=True)
        tokens = torch.randint(61, (64, 17), generator=torch.Generator().manual_seed(1))
        (model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return {name: ((p.detach() - before[name]).abs().mean() / rates[id(p)]).item() for name, p in model.named_parameters()}

    for parametrization in ("mup", "complete_p"):
        base, large = first_update(32, parametrization), first_update(256, parametrization)
        for name in ("embedding.weight", "position_embedding.weight", "unembedding.weight", "blocks.0.mlp.up.weight"):
            assert 0.05 < base[name] < 0.95, name  # epsilon matters there
            assert large[name] == pytest.approx(base[name], rel=0.15), name


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_initial_variances_are_the_tables(parametrization: str, tied: bool) -> None:
    fields = {**LARGE, "scaled_output_init": False, "tied_embeddings": tied, **with_base(parametrization)}
    for name, module, parameter in owned_parameters(make(**fields)):
        expected = 0.1 / math.sqrt(4.0) if row_of(name, module) == "hidden" else 0.1
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_what_the_depth_sets_by_itself_stays_at_the_bases_under_a_rule_for_depth() -> None:
    """Branches are multiplied by m_L^-alpha already: 1/sqrt(2 L) and 1/sqrt(L) beside it would count the depth twice."""
    for parametrization, depth in (("mup", 6), ("depth_mup", 2), ("complete_p", 2)):
        down = make(**LARGE, **with_base(parametrization)).blocks[0].mlp.down.weight  # pyright: ignore
        assert down.std().item() == pytest.approx(0.1 / math.sqrt(4.0) / math.sqrt(2 * depth), rel=0.03)
        protected = ModelConfig(**LARGE, block="outlier_protected", **with_base(parametrization))
        assert protected.residual_gain == pytest.approx(depth**-0.5)


@pytest.mark.parametrize("fields", [{}, {"residual_gain_form": "scalar"}, {"residual_gain_form": "vector"}])
def test_branches_are_multiplied_by_the_depth_ratio(fields: dict[str, Any]) -> None:
    for parametrization, alpha in PARAMETRIZATIONS.items():
        model = make(**LARGE, **fields, positions="learned", **with_base(parametrization)).double()
        block: Any = model.blocks[0]
        x = torch.randn(2, 16, 128, dtype=torch.float64)
        factor = 1.0 if parametrization == "mup" else 3.0**-alpha
        from model.attention import Context

        normed = block.attention_norm(x)
        z = x + factor * block.attention(normed, normed, Context())
        torch.testing.assert_close(block(x, Context()), z + factor * block.mlp(block.mlp_norm(z)), rtol=0, atol=1e-12)


def test_scores_have_the_eight_over_head_dim_convention() -> None:
    """1/sqrt(64) = 8/64: heads of the base's size are as in the standard one, and wider ones have 1/d."""
    config: dict[str, Any] = {**BASE, "width": 256, "parametrization": "mup", "base_width": 64}
    for heads, head_dim in ((4, 64), (2, 128), (1, 256)):
        model = make(**{**config, "heads": heads, "base_head_dim": 64})
        assert model.blocks[0].attention.scale == pytest.approx(8.0 / head_dim)  # pyright: ignore


@pytest.mark.parametrize("tied", [True, False])
def test_training_and_generation_have_the_same_logits(tied: bool) -> None:
    """The loss is that of the logits which generation samples from, also through the exported class and Functional-SAM's chunks."""
    model = make(**LARGE, tied_embeddings=tied, **with_base("complete_p"))
    tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits, loss = model(inputs), model(inputs, targets)
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), loss)
    exported = BurnishForCausalLM(transformers_config(model.config))
    exported.network.load_state_dict(model.state_dict())
    assert torch.equal(exported(inputs).logits, logits)
    gradient = torch.autograd.grad(loss, model.embedding.weight)[0]
    with torch.no_grad():
        frozen = FrozenHead(targets, hidden=model.hidden_states(inputs), weight=model.unembedding.weight.clone())
    through_chunks = torch.autograd.grad(model(inputs, targets, None, frozen), model.embedding.weight)[0]
    torch.testing.assert_close(through_chunks, gradient, rtol=1e-4, atol=1e-5)


def test_logits_are_divided_by_the_width_ratio() -> None:
    model, normed = make(**LARGE, **with_base("mup")), []
    model.final_norm.register_forward_hook(lambda module, args, output: normed.append(output))
    logits = model(torch.arange(16)[None])
    torch.testing.assert_close(logits, normed[0] @ model.unembedding.weight.T / 4)


def test_a_factor_on_the_logits_is_a_smaller_start_and_learning_rate_of_the_unembedding() -> None:
    """For Adam, (factor 1/m, std s, rate e) and (factor 1, std s/m, rate e/m) are the same network, bit for bit where m is a power of 2.

    Having both, the double count that other code is known for, is not.
    """

    def outputs(by_hand: bool, double: bool = False) -> torch.Tensor:
        fields = {**LARGE, "tied_embeddings": False, "scaled_output_init": False, "norm_epsilon": 1e-6}
        model = make(**fields, **with_base("mup"))
        section = OptimizerSection(learning_rate=1e-2, weight_decay=0.0, epsilon=1e-30)
        optimizer = torch.optim.AdamW(
            [{**group, "params": group["params"]} for group in parameter_groups(model, section).values()], weight_decay=0.0
        )
        readout = model.unembedding.weight
        if by_hand or double:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not readout]
            optimizer.add_param_group({"params": [readout], "lr": 1e-2 / 4, "eps": 1e-30, "weight_decay": 0.0, "lr_factor": 1.0})
        if by_hand:
            readout.data /= 4
            unembed = model.unembedding.forward
            model.unembedding.forward = lambda hidden, *loss: unembed(hidden * 4, *loss)  # pyright: ignore
        for step in range(3):
            tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(tokens[:, :-1], tokens[:, 1:]) / 64).backward()
            optimizer.step()
        return model(torch.arange(16)[None]).detach()

    assert torch.equal(outputs(False), outputs(True))
    assert not torch.allclose(outputs(False), outputs(False, double=True), rtol=1e-3)


def test_embedding_learning_rate_factor_is_on_the_embeddings_alone() -> None:
    section = OptimizerSection(learning_rate=0.1, embedding_learning_rate_factor=8.0)
    groups = parameter_groups(make(**BASE, tied_embeddings=False), section)
    assert {name: group["lr_factor"] for name, group in groups.items()} == {"matrices": 1, "embeddings": 8, "vectors": 1, "the rest": 1}
