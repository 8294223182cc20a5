"""What deletes files is listed with what it deletes: only what the package made, in a folder that it made."""

from __future__ import annotations

import ast

from test_reading import called
from test_structure import ROOT, python_files

DELETERS = {("", "remove"), ("os", "remove"), ("os", "unlink"), ("os", "rmdir"), ("os", "removedirs")}
METHODS = {"rmtree", "unlink", "rmdir"}
OWN_NAME = "a file that this writer alone names"
STATES = "states of the run in its own folder checkpoints/"
ALLOWED = {
    "checkpoints/atomic.py remove": "temporary names of a path that it writes, and what that path was before",
    "checkpoints/atomic.py rmtree": "see remove; never what a link leads to",
    "checkpoints/atomic.py unlink": "see remove",
    "checkpoints/export.py unlink": "the file that --force replaces, and its weights",
    "checkpoints/state.py remove": STATES,
    "launch/slurm/folder.py unlink": "a submission that was not sent",
    "launch/slurm/environment.py unlink": "a result of submitit, by the number of this job",
    "launch/slurm/stop.py unlink": "a request to stop; the number of its job is a safe_name",
    "transfer/analysis/visualize/visualize.py unlink": "pictures beside the numbers.json that names them",
    "transfer/bench_run.py rmtree": "the run of a trial, whose folder has a safe_name and no link",
    "transfer/data/shard_index.py unlink": "the lock of an index in the cache folder, which its holder made",
    "transfer/engine/cached_targets.py unlink": OWN_NAME,
    "transfer/engine/fence.py rmdir": "a run folder that is empty",
    "transfer/engine/fence.py unlink": OWN_NAME,
    "transfer/staging.py unlink": "a file of the copy that is being made",
    "transfer/staging.py rmtree": "a copy in graftvit-data-<user>, which is this user's alone and no link",
}


def test_each_deletion_is_known() -> None:
    found = set()
    for path in python_files(ROOT):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            name, owner = called(node.func) if isinstance(node, ast.Call) else ("", "")
            if name in METHODS or (owner, name) in DELETERS:
                found.add(f"{path} {name}")
    assert sorted(found - ALLOWED.keys()) == [], (
        "delete only what the package made, and say here what that is"
    )
    assert sorted(ALLOWED.keys() - found) == [], "allowed, and no longer there"
