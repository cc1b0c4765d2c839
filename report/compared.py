"""A comparison of several bundles as plain data: what ``xexport compare --json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xexport.core.manifest import Manifest
from xexport.core.records import Record
from xexport.core.stats import finite_or_none as number
from xexport.report.along import overtakes
from xexport.report.jsonout import weights_bytes
from xexport.report.rivals import Rival, common_positions, rivals_of, step_ratio
from xexport.report.versus import versus

__all__ = ["comparison"]


def comparison(entries: Sequence[tuple[Manifest, Sequence[Record]]]) -> dict[str, Any]:
    """Keys: models[], findings[], step_ratios[], state_overtakes[].

    A row of ``models``: label, model, target, input_unit, parameters, weights, bits_per_byte (None for random
    weights), step_ms{position: median}, prefill_tokens_per_s{length: median}, state{fixed, per_token,
    bound, allocated}. A row of ``step_ratios``: position, of, to, ratio (a step of the one over a step
    of the other), low, high, from rounds made in turns.
    """
    rivals = rivals_of(entries)
    return {
        "models": [_model(r) for r in rivals],
        "findings": [s.text for s in versus(rivals)],
        "step_ratios": _ratios(rivals),
        "state_overtakes": [
            {"growing": g.label, "constant": f.label, "from_token": overtakes(g.state, f.state)}
            for g in rivals
            if g.state.grows
            for f in rivals
            if not f.state.grows
        ],
    }


def _model(rival: Rival) -> dict[str, Any]:
    row = rival.fidelity
    turns = rival.turns
    return {
        "label": rival.label,
        "model": rival.manifest.model.family,
        "target": rival.manifest.target,
        "input_unit": rival.unit,
        "parameters": rival.manifest.model.parameters,
        "weights": weights_bytes(rival.manifest),
        "bits_per_byte": number(row.bits_per_byte("candidate")[0]) if row and not rival.random else None,
        "step_ms": {str(t.at): number(t.median_ms) for t in turns.steps} if turns else {},
        "prefill_tokens_per_s": {str(t.at): number(t.at * 1e3 / t.median_ms) for t in turns.prefill}
        if turns
        else {},
        "state": rival.state._asdict(),
    }


def _ratios(rivals: Sequence[Rival]) -> list[dict[str, Any]]:
    rows = []
    for place in common_positions(rivals):
        for index, one in enumerate(rivals):
            for other in rivals[index + 1 :]:
                found = step_ratio(one, other, place)
                if found is not None:
                    ratio, low, high = map(number, found)
                    row = {"position": place, "of": one.label, "to": other.label}
                    rows.append({**row, "ratio": ratio, "low": low, "high": high})
    return rows
