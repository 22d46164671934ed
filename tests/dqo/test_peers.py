import socket

import pytest

from dqo import peers
from dqo.peers import Peer


@pytest.fixture
def launch(monkeypatch):
    """Tells who the processes are, of which this one is the first."""
    monkeypatch.setattr(peers, "_peers", [])
    monkeypatch.setattr(peers, "BESIDE_SECONDS", 0.0)
    return lambda others: peers.know([peers.listen(), *others], 0)


def gone(host="node7"):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return Peer(host, "127.0.0.1", closed.getsockname()[1])


BROKEN = RuntimeError(
    "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:947. This is typical"
)


def test_who_does_not_live_is_named(launch):
    with socket.create_server(("127.0.0.1", 0)) as lives:  # nobody serves it
        launch([Peer("node6", "127.0.0.1", lives.getsockname()[1]), gone()])
        assert peers.is_lost(BROKEN) and peers.lost() == [2]
        said = peers.loss(BROKEN)
        assert said.startswith("lost process 2 on node7 (127.0.0.1), of 3 processes; ") and "\n" not in said
        launch([gone() for _ in range(6)])
        assert "process 4 on node7 (127.0.0.1), 2 more, of 7 processes" in peers.loss(BROKEN)
        launch([Peer("node6", "127.0.0.1", lives.getsockname()[1])])
        assert peers.loss(BROKEN).startswith(
            "the connection between the 2 processes broke (Connection closed by peer [10"
        )


def test_only_a_broken_exchange_of_several_is_a_loss(launch):
    assert not peers.is_lost(BROKEN)  # one process has nobody to lose
    launch([gone()])
    assert peers.is_lost(BROKEN)
    assert not peers.is_lost(RuntimeError("shape '[2, 3]' is invalid for input of size 5"))
    assert not peers.is_lost(ValueError("Connection closed by peer"))


def test_one_machine_has_all_processes_of_its_launch():
    assert not peers.several_machines({})
    assert not peers.several_machines({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"})
    assert not peers.several_machines({"WORLD_SIZE": "8"})  # a launcher that does not tell
    assert peers.several_machines({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"})
