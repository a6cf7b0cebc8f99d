"""Before any time counts: ours and the peer compute the same thing, in the precision timed."""

import statistics
from typing import Any

import torch

from benchmarks.gpu_call.setting import Setting
from benchmarks.peers import peer_of
from benchmarks.peers.peer import gradient_errors
from benchmarks.shapes import hybrid, random_batch
from benchmarks.steps import our_loss, our_model


def agreement(setting: Setting) -> dict[str, Any]:
    """One period of layers in bf16, ours and theirs, against theirs in fp32: our error may be at
    most twice theirs, in the loss and in the gradients together. `agrees` says whether it is."""
    rehearse = setting.rehearsal
    length = 64 if rehearse else 2048
    config = hybrid(setting.shape, window=16 if rehearse else 512)
    layers = config.layer_plan.model_copy(update={"num_layers": 4})
    config = config.model_copy(update={"layer_plan": layers})
    tokens, targets = random_batch(config, 1, length, setting.device)
    model = our_model(config, setting.device, torch.bfloat16)
    exact = our_model(config, setting.device, torch.float32)
    for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        parameter.data.copy_(rounded.data)
    truth, peer = (peer_of("sdpa", each, length) for each in (exact, model))
    losses = {
        "ours": our_loss(model, tokens, targets),
        "theirs": peer.loss(tokens),
        "truth": truth.loss(tokens),
    }
    for loss in losses.values():
        loss.backward()
    mine = gradient_errors(model, truth)
    named = dict(truth.module.named_parameters())
    theirs = {
        name: ((p.grad.double() - named[name].grad.double()).norm() / named[name].grad.norm())
        for name, p in peer.module.named_parameters()
    }
    result = {
        "loss_error": abs(float(losses["ours"] / losses["truth"]) - 1),
        "their_loss_error": abs(float(losses["theirs"] / losses["truth"]) - 1),
        "gradient_error": statistics.fmean(mine.values()),
        "their_gradient_error": statistics.fmean(float(value) for value in theirs.values()),
    }
    # The loss of a mean over thousands of tokens can be right by luck: a floor for theirs.
    agrees = (
        result["loss_error"] <= 2 * max(result["their_loss_error"], 1e-4)
        and result["gradient_error"] <= 2 * result["their_gradient_error"]
    )
    return {"agreement": "bf16 against Cohere2 in fp32", "agrees": agrees, **result}
