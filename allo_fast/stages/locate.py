"""The key neurons: the weights that the warm-up moved most.

    importance_i = |theta'_i - theta_i|; the top floor(ratio x N) over the whole model
    `allo-fast locate CONFIG`

Departs from the release: exact, counted once for tied weights, and measured from the values that the optimizer started
from. Forgetting and learning have a ratio each. Writes forget.safetensors, learn.safetensors and counts.json.
"""

import json
from collections.abc import Generator

from allo_fast import ranks
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.weights import named_weights, size_of
from allo_fast.runs.run import Progress, Unit
from allo_fast.stages.models import base_path


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    config, counts, facts = unit.config, {}, {}
    sharded = unit.zero is not None and unit.zero.sharded
    before = load_model(base_path(unit), config.model, sharded=sharded)
    after = load_model(unit.needed("warmup") / "model", config.model, dtype="float32", sharded=sharded)
    sizes = {name: size_of(weight) for name, weight in named_weights(before).items()}
    for done, (stage, ratio) in enumerate((("forget", config.forget.ratio), ("learn", config.learn.ratio)), start=1):
        selection = Selection.from_delta(
            before,
            after,
            ratio,
            exclude=tuple(config.locate.exclude),
            skip=config.locate.skip,
            protocol=config.protocol,
        )
        if ranks.is_main():
            selection.save(unit.folder / f"{stage}.safetensors")
        counts[stage] = {name: [len(selection.positions(name)), size] for name, size in sizes.items()}
        facts |= {f"{stage}_selected": selection.selected, f"{stage}_sha256": selection.sha256()}
        yield Progress(done, 2, "selection")
    if ranks.is_main():
        (unit.folder / "counts.json").write_text(json.dumps(counts, indent=1))
    return {"parameters": sum(sizes.values()), **facts}
