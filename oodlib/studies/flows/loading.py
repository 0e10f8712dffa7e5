"""Flows for a notebook, whose run is told what they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oodlib.studies.flows.runs import FlowRun, flow_run

if TYPE_CHECKING:
    from oodlib.claims import Run


def load(run: Run, names: Sequence[str], **options: Any) -> list[FlowRun]:
    """Flows by name, as `flow_run` gives them; prints one line each.

    The hashes of weights and images go into the provenance of ``run``.
    """
    flows = []
    for name in names:
        flow = flow_run(name, **options)
        sets = {f"{name}/{key}": facts["fingerprint"] for key, facts in flow.record["sets"].items()}
        run.uses(weights={name: flow.record["weights"]}, data=sets)
        last = flow.record["history"][-1]
        print(
            f"{name}: {last['step']} steps ({last['epoch']:.1f} epochs), "
            f"{last['validation_bpd']:.2f} bits/dim on validation images"
        )
        flows.append(flow)
    return flows
