"""There is one way from queries, keys and values to attention output: a fault planted in it is seen
on every path, and nothing beside it rotates, scales or attends."""

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megahybrid
from megahybrid.errors import AuditError, ConfigError
from megahybrid.evaluate.attention import attention_of
from megahybrid.evaluate.cache import by_layers
from megahybrid.evaluate.example import Example
from megahybrid.evaluate.generation import Decoder
from megahybrid.model import attention, core_attention
from megahybrid.model.block import Block
from megahybrid.model.kernels import AttentionSpec, attend
from megahybrid.model.rotary import rotate_both
from megahybrid.model.transformer import Transformer
from megahybrid.parallel.mesh import ParallelMesh
from tests.model.test_compiled import TRACED, fresh_compiler
from tests.model.test_selftest import check
from tests.parity.cases import model
from tests.plain_model import random_tensors

PACKAGE = Path(megahybrid.__file__).parent
LENGTH = 40


def keys_still(q: Tensor, k: Tensor, table: Any) -> tuple[Tensor, Tensor]:
    """Queries are rotated alone."""
    return rotate_both(q, k, table)[0], k


def half_the_values(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, kernel: str) -> Tensor:
    """The attention output is half of what it is."""
    return attend(q, k, v, spec, kernel) / 2


FAULTS: dict[str, Callable[..., Any]] = {"rotate_both": keys_still, "attend": half_the_values}


def built(how: str) -> Transformer:
    """A model whose blocks run `as-written`, as compiled `pieces` or as compiled `regions`."""
    config = model("rnope_swa")
    found = Transformer(config, ParallelMesh.single()).double()
    found.load_canonical(random_tensors(config, 1))
    for block in found.blocks:
        assert isinstance(block, Block)
        if how == "pieces":
            block.compile_pieces(TRACED)
        if how == "regions":
            block.compile_regions(TRACED)
    return found


def tokens() -> Tensor:
    return torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def trained(how: str) -> Tensor:
    """The loss and the gradients' sum of a training step."""
    one = built(how)
    loss, _ = one(tokens(), tokens())
    grads = torch.autograd.grad(loss, [p for p in one.parameters() if p.requires_grad])
    return torch.stack([loss.detach(), *(grad.abs().sum() for grad in grads)])


def decoded() -> Tensor:
    """Logits of a prompt and of a token more."""
    decoder = Decoder(built("as-written"), tokens().tolist(), 1)
    return torch.cat([decoder.prefill(chunk_tokens=7), decoder.step(torch.tensor([3]))])


def analysed() -> Tensor:
    """Where the heads of the last layer look."""
    example = Example(tuple(tokens()[0].tolist()), 20, 30, ((9, 14),))
    found, _ = attention_of(built("as-written"), example, position_bins=4)
    return torch.cat((found.mass[-1].flatten(), found.max_logit[-1]))


PATHS: dict[str, Callable[[], Tensor]] = {
    "training as written": lambda: trained("as-written"),
    "training in compiled pieces": lambda: trained("pieces"),
    "training in compiled regions": lambda: trained("regions"),
    "evaluation": lambda: built("as-written").logits(tokens()),
    "evaluation of compiled layers": lambda: built("regions").logits(tokens()),
    "evaluation layer by layer": lambda: by_layers(
        built("as-written"), tokens(), torch.zeros_like(tokens())
    ),
    "generation from a cache": decoded,
    "analysis of attention": analysed,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", PATHS)
def test_a_fault_in_the_core_is_seen_on_every_path(
    path: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_compiler():
        right = PATHS[path]()
    monkeypatch.setattr(core_attention, fault, FAULTS[fault])
    with fresh_compiler():
        wrong = PATHS[path]()
    assert right.isfinite().all() and wrong.isfinite().all()
    assert (right - wrong).norm() > 1e-3 * right.norm()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_core_is_seen_by_the_self_test(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_attention, fault, FAULTS[fault])
    with pytest.raises(AuditError, match="self-test: scheme"):
        check("rope-window")


@pytest.mark.parametrize(
    "path",
    ["training as written", "evaluation", "evaluation layer by layer", "generation from a cache"],
)
def test_what_no_kernel_serves_is_refused_on_every_path(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.Attention.spec
    monkeypatch.setattr(
        attention.Attention,
        "spec",
        lambda self, context, batch: replace(right(self, context, batch), bias=torch.zeros(4)),
    )
    with pytest.raises(ConfigError, match="bias of the scores"):
        PATHS[path]()


# What does the work, and the only functions that may call it, by file.
CALLERS = {
    # A cache keeps the keys of two views once, not rotated, and turns them for each as it reads.
    # So do context ranks with what they received of these.
    "rotate": {
        "model/rotary.py rotate_both",
        "evaluate/cache.py _rotated",
        "model/context_attention.py rotated",
    },
    "rotate_back": {"model/context_attention.py rotated_back"},
    "rotate_both": {"model/core_attention.py prepare_queries_keys"},
    "attend": {"model/core_attention.py core_attention"},
    "prepare_queries_keys": {
        "model/attention.py prepared",
        "model/selftest/laws.py scales_its_queries",
    },
    "core_attention": {
        "evaluate/cache.py _attend",
        "evaluate/cache.py _attend_views",
        "model/kernels/choice.py run",
        # Its two halves, for keys that are gathered again in backward.
        "model/core_attention.py attention_forward",
        "model/core_attention.py attention_backward",
    },
    "attention_forward": {"model/context_attention.py forward"},
    "attention_backward": {"model/context_attention.py backward"},
    "attend_sharded": {"model/attention.py attended"},
    "attend_sharded_views": {"model/fusion.py _over_ranks"},
    "query_factor": {"model/score_scale.py _plain_factor", "model/score_scale.py factor"},
}
# A model that goes to Hugging Face brings its own code, held to ours by comparing logits.
ELSEWHERE = "interop/remote_code/"


def callers(of: str) -> set[str]:
    """The functions of the package that call `of` by its name, or as somebody's attribute."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        where = str(path.relative_to(PACKAGE))
        text = path.read_text()
        if of in text and not where.startswith(ELSEWHERE):
            for function in functions(ast.parse(text)):
                if of in names_called(function):
                    found.add(f"{where} {function.name}")
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def names_called(function: ast.FunctionDef) -> set[str]:
    """What is called in a function, but for functions inside of it."""
    found, left = set(), list(function.body)
    while left:
        node: ast.AST = left.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        left.extend(ast.iter_child_nodes(node))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("of", CALLERS)
def test_nothing_beside_the_core_prepares_or_attends(of: str) -> None:
    assert callers(of) == CALLERS[of]


def test_torch_s_attention_is_called_by_kernels_alone() -> None:
    callers = {
        str(path.relative_to(PACKAGE).parent)
        for path in PACKAGE.rglob("*.py")
        if any(
            isinstance(node, ast.Attribute) and node.attr == "scaled_dot_product_attention"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert callers - {ELSEWHERE.rstrip("/")} == {"model/kernels"}


def test_a_second_path_would_be_found() -> None:
    second = "def f(q, k, t):\n    def g():\n        attend()\n    return rotate_both(q, k, t)\n"
    outer, inner = functions(ast.parse(second))
    assert names_called(outer) == {"rotate_both"} and names_called(inner) == {"attend"}
