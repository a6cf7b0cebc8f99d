"""Every kernel refuses by itself what it does not say it can do."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from megahybrid.config.training import KernelConfig
from megahybrid.errors import ConfigError
from megahybrid.model.kernels import KERNELS, AttentionSpec, Place, attend
from megahybrid.model.kernels import registry as table
from megahybrid.model.kernels.kernel import Kernel
from megahybrid.model.kernels.registry import REGISTRY, TABLE

HOST = Place(torch.device("cpu"), torch.float32, 16)
PLAIN = AttentionSpec(scale=0.25)
# A spec with each feature that no kernel serves yet.
UNSERVED: dict[str, Any] = {
    "bias": torch.zeros(8, 8),
}


def heads(queries: int = 8, keys: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(n, 1, count, 16, generator=generator)
        for n, count in ((queries, 2), (keys, 1), (keys, 1))
    )


def test_every_field_of_a_spec_but_the_scale_is_a_feature_and_has_words() -> None:
    names = {each.name for each in fields(AttentionSpec)} - {"scale"}
    assert {each.name for each in fields(AttentionSpec) if "words" in each.metadata} == names
    served = {name for kernel in TABLE for name in kernel.serves | kernel.needs}
    assert served | set(UNSERVED) == names and not served & set(UNSERVED)


@pytest.mark.parametrize("feature", UNSERVED)
@pytest.mark.parametrize("kernel", [*REGISTRY, "auto"])
def test_a_feature_that_no_kernel_serves_is_refused_by_every_one(kernel: str, feature: str) -> None:
    spec = replace(PLAIN, **{feature: UNSERVED[feature]})
    words = spec.features()[feature]
    with pytest.raises(ConfigError) as refused:
        attend(*heads(), spec, kernel)
    assert str(refused.value).startswith(f"kernels={kernel}") and words in str(refused.value)
    if kernel != "auto":
        assert str(refused.value).endswith("No kernel can, here.")


def test_a_refusal_names_the_kernel_the_feature_and_the_kernels_that_can() -> None:
    q, k, v = (x.requires_grad_() for x in heads())
    with pytest.raises(ConfigError) as refused:
        attend(q, k, v, replace(PLAIN, window=3), "cudnn")
    assert str(refused.value) == "kernels=cudnn has no window (window=3). Use blocked."
    with pytest.raises(ConfigError) as refused:
        attend(q, k, v, PLAIN, "varlen")
    assert str(refused.value) == (
        "kernels=varlen needs a CUDA device (device=cpu). Use blocked or sdpa."
    )


def test_keys_that_are_given_one_by_one_have_a_kernel_of_their_own() -> None:
    q, k, v = heads(3, 8)
    visible = torch.ones(1, 3, 8, dtype=torch.bool).tril(5)
    spec = replace(PLAIN, visible=visible)
    whole = torch.cat((torch.zeros(5, 1, 2, 16), q))
    right = attend(whole, k, v, PLAIN, "reference")[5:]
    torch.testing.assert_close(attend(q, k, v, spec), right)
    for kernel in KERNELS:
        with pytest.raises(ConfigError, match="has no keys given one by one. Use masked"):
            attend(q, k, v, spec, kernel)
    with pytest.raises(ConfigError, match="kernels=masked serves nothing without visible"):
        attend(*heads(), PLAIN, "masked")


def test_a_kernel_is_added_by_its_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    added = Kernel("added", lambda q, k, v, spec: q, frozenset({"bias"}), rank=lambda spec: 9)
    monkeypatch.setattr(table, "TABLE", (*TABLE, added))
    monkeypatch.setitem(table.REGISTRY, "added", added)
    q, k, v = heads()
    biased = replace(PLAIN, bias=torch.zeros(2))
    assert torch.equal(attend(q, k, v, biased), q)
    with pytest.raises(ConfigError, match=r"kernels=sdpa has no bias of the scores. Use added\."):
        attend(q, k, v, biased, "sdpa")
    with pytest.raises(ConfigError, match="kernels=added has no window"):
        attend(q, k, v, replace(biased, window=2), "added")


def test_the_run_file_names_kernels_of_the_table() -> None:
    named = {
        name
        for field in ("full", "windowed")
        for name in KernelConfig.model_fields[field].annotation.__args__  # type: ignore[union-attr]
    }
    assert named - {"auto"} == set(KERNELS)
