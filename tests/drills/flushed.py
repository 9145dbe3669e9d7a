"""What a loss of power could take although something says that it is there: by the operations of a whole job."""

from pathlib import PurePath

from tests.drills.drill import drill
from tests.drills.injector import Operation, fault, library, operations, reason
from tests.drills.lab import Lab, Verdict
from tests.drills.run import CONFIG, MANIFEST, TINY


def unflushed(found: list[Operation]) -> list[str]:
    """Files whose bytes were not flushed when they got their name, or their unit its manifest; folders whose names
    were not when a unit in them got it, or in the end."""
    lost, bytes_of, names_in = set(), set(), set()
    for operation in found:
        path, new = PurePath(operation.path), PurePath(operation.target or operation.path)
        match operation.name:
            case "write" | "truncate":
                bytes_of.add(path)
            case "fsync":
                bytes_of.discard(path)
                names_in.discard(path)
            case "unlink" | "rmdir":
                bytes_of.discard(path)
                names_in.discard(path)
            case "mkdir" if not is_partial(path):
                names_in.add(path.parent)
            case "rename":
                if not is_partial(new):
                    lost |= {each for each in bytes_of if each.is_relative_to(path)}
                    names_in.add(new.parent)
                if new.name == MANIFEST and not is_partial(new):
                    lost |= {each for each in bytes_of if each.is_relative_to(new.parent) and not is_partial(each)}
                    lost |= names_in & {*new.parent.parents}
                bytes_of = {new / each.relative_to(path) if each.is_relative_to(path) else each for each in bytes_of}
    return sorted(map(str, lost | names_in))


def is_partial(path: PurePath) -> bool:
    return any(part.endswith(".partial") for part in path.parts)


@drill("Killed and resumed", "loss of power: what is said to be there is flushed", "fresh")
def loss_of_power(lab: Lab) -> Verdict:
    if library() is None:
        return Verdict("skipped", reason)
    log = lab.folder / "operations"
    done = lab.allo("run", CONFIG, *TINY, before=fault("count", 0, lab.folder, log=log))
    assert done.code == 0, done.line
    lost = unflushed(found := operations(log))
    said = f"{len(found)} operations, {len(lost)} paths not flushed"
    return Verdict("silent", said, ", ".join(lost[:3])) if lost else Verdict("good", said)
