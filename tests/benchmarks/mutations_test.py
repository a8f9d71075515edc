import ast

import pytest

from benchmarks import mutations


@pytest.mark.parametrize(
    "module", ["metrics/_certified.py", "losses/_smoothing.py", "certification/halfspaces/_testers.py"]
)
def test_each_change_is_another_program(module):
    source = (mutations.ROOT / "robustjax" / module).read_bytes()
    changes = list(mutations.changes_in(module))
    whole = ast.dump(ast.parse(source))
    for change in changes:
        assert source[change.start : change.end].decode() == change.before
        changed = source[: change.start] + change.after.encode() + source[change.end :]
        assert ast.dump(ast.parse(changed)) != whole, change
    assert len(changes) > 20
    assert len({*changes}) == len(changes)


def test_tests_of_a_module_are_its_mirror_or_those_of_its_folder():
    assert mutations.tests_of("metrics/_certified.py")[0] == ["tests/metrics/certified_test.py"]
    mirror, room = mutations.tests_of("certification/conformal/_sets.py")
    assert mirror == ["tests/certification/conformal/sets_test.py"]
    assert "tests/certification/smoothing_test.py" in room
    assert not {*mirror} & {*room}
