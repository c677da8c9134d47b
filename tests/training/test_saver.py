"""What is copied to be written beside training; the saving itself is in tests/distributed/test_survival.py."""

from __future__ import annotations

from collections import OrderedDict

import torch

from training.saver import HostCopies


def test_a_copy_holds_what_was_there_and_shares_what_was_shared() -> None:
    flat = torch.arange(12.0)
    names = OrderedDict(a=flat[:4], b=flat.view(3, 4).t(), tied=flat[:4])
    names._metadata = {"version": 1}  # as torch's state dicts have it
    content = {"module": names, "groups": [{"lr": 0.1, "params": [0, 1]}], "seen": {1}, "pair": (torch.ones(2, dtype=torch.bfloat16), "x")}
    copies, arrived = HostCopies().of(content)
    arrived()
    flat.fill_(-1)
    content["groups"][0]["lr"] = 0.2
    content["seen"].add(2)
    assert torch.equal(copies["module"]["a"], torch.arange(4.0)) and torch.equal(copies["module"]["b"], torch.arange(12.0).view(3, 4).t())
    assert copies["module"]["tied"].untyped_storage().data_ptr() == copies["module"]["b"].untyped_storage().data_ptr()
    assert copies["module"]._metadata == {"version": 1} and type(copies["module"]) is OrderedDict
    assert copies["groups"] == [{"lr": 0.1, "params": [0, 1]}] and copies["seen"] == {1}
    assert copies["pair"][0].dtype == torch.bfloat16 and copies["pair"][1] == "x"


def test_memory_is_kept_for_the_next_time() -> None:
    copies, weights = HostCopies(), {"a": torch.ones(1000), "b": torch.ones(1000), "empty": torch.empty(0)}
    first, _ = copies.of(weights)
    places = {first[name].data_ptr() for name in ("a", "b")}
    weights["a"].fill_(2.0)
    second, _ = copies.of({**weights, "moment": torch.zeros(7)})
    assert {second[name].data_ptr() for name in ("a", "b")} == places
    assert second["a"].tolist() == [2.0] * 1000 and second["b"].tolist() == [1.0] * 1000 and second["empty"].numel() == 0
