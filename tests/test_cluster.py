"""Clusters found in the environment: what launchers and schedulers write, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transferkit.cluster import Cluster, find_cluster, slurm_nodes, split_address
from transferkit.errors import PlacementError, PlanError

TWO = ("10.0.0.1:2222", "10.0.0.2:2222")


def tf_config(cluster: Any, kind: str = "worker", index: Any = 0) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def found_in(environ: dict[str, str], **more: Any) -> Cluster:
    cluster = find_cluster(environ, **more)
    assert cluster is not None
    return cluster


def problems_in(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(PlacementError) as caught:
        find_cluster(environ)
    assert caught.value.fix
    return caught.value.found


# ------------------------------------------------------------------------------------------------------------ the value


def test_a_cluster_says_who_it_is() -> None:
    chief, other = Cluster(TWO, 0), Cluster(TWO, 1)
    assert (chief.size, chief.is_chief, other.is_chief, chief.is_complete) == (2, True, False, True)
    assert str(chief) == "worker 0 (10.0.0.1:2222) of 2"
    assert str(other) == "worker 1 (10.0.0.2:2222) of 2, whose chief is 10.0.0.1:2222"
    assert "\n" not in repr(other)
    assert json.loads(other.tf_config()) == {"cluster": {"worker": list(TWO)}, "task": {"type": "worker", "index": 1}}
    assert split_address("[fe80::1]:80") == ("fe80::1", 80)
    assert find_cluster({"TF_CONFIG": other.tf_config()}) == other


def test_a_cluster_checks_its_addresses() -> None:
    workers = ("a:1", "b", "c:0", "d:65536", "a:1", "e f:9", "::1:9", "[::1]:9", "x/y:9")
    with pytest.raises(PlanError) as caught:
        Cluster(workers, 9)
    assert caught.value.found == (
        "worker 1: 'b' isn't host:port",
        "worker 2: 'c:0' has the port '0'; ports are 1 to 65535",
        "worker 3: 'd:65536' has the port '65536'; ports are 1 to 65535",
        "workers 0 and 4 have the same address 'a:1'",
        "worker 5: 'e f:9' isn't host:port",
        "worker 6: '::1:9' isn't host:port",
        "worker 8: 'x/y:9' isn't host:port",
        "the index 9; of 9 workers the last is number 8",
    )
    with pytest.raises(PlanError, match="no worker"):
        Cluster((), 0)
    with pytest.raises(PlanError, match="isn't a whole number"):
        Cluster(TWO, True)


def test_hosts_that_are_not_known_yet() -> None:
    cluster = Cluster(("10.0.0.1:2222", ":2223"), 1)
    assert not cluster.is_complete
    assert str(cluster) == "worker 1 (port 2223) of 2, whose chief is 10.0.0.1:2222"
    with pytest.raises(PlacementError) as caught:
        cluster.tf_config()
    assert str(caught.value) == (
        "Writing TF_CONFIG.\n"
        "  found: the host of worker 1 (port 2223) isn't known\n"
        "  likely cause: RANK and MASTER_ADDR say where the chief is, and nothing of the others\n"
        "  to fix it: cluster = check_in(cluster), by which the workers learn each other's hosts"
    )


def test_no_cluster() -> None:
    assert find_cluster({}) is None
    assert find_cluster({"TF_CONFIG": "  "}) is None
    assert find_cluster({"TF_CONFIG": "{}"}) is None
    # sbatch's own variables, without srun: one process
    assert find_cluster({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[1-4]"}) is None


# ------------------------------------------------------------------------------------------------------------ TF_CONFIG


def test_tf_config() -> None:
    assert found_in(tf_config({"worker": TWO}, index=1)) == Cluster(TWO, 1)
    assert found_in(tf_config({"worker": TWO}, index="1")) == Cluster(TWO, 1)
    three = {"chief": ["c:1"], "worker": ["a:1", "b:1"], "evaluator": ["e:1"]}
    assert found_in(tf_config(three, "chief")) == Cluster(("c:1", "a:1", "b:1"), 0)
    assert found_in(tf_config(three, "worker", 1)) == Cluster(("c:1", "a:1", "b:1"), 2)


def test_tf_config_that_does_not_fit() -> None:
    assert problems_in({"TF_CONFIG": "worker"}) == ("'worker', which isn't JSON: Expecting value: line 1 column 1 (char 0)",)
    assert problems_in({"TF_CONFIG": "[1]"}) == ("'[1]', which isn't an object",)
    assert problems_in({"TF_CONFIG": "[" * 100_000})[0].startswith("'[[")
    assert problems_in({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}) == ("no task: which worker is this?",)
    assert problems_in({"TF_CONFIG": '{"task": {"type": "worker", "index": 0}}'}) == (
        "no cluster",
        "the task is worker 0, and the cluster lists 0 of these",
    )
    assert problems_in({"TF_CONFIG": '{"cluster": [], "task": 3}'}) == (
        "the cluster [], which isn't an object",
        "the task 3, which isn't an object",
    )
    assert problems_in(tf_config({"worker": TWO, "ps": ["p:1"]}, "ps")) == (
        "parameter servers (ps): a model is trained by workers alone here",
        "the task's type is 'ps'; it must be 'worker' or 'chief'",
    )
    assert problems_in(tf_config({"worker": TWO, "evaluator": ["e:1"]}, "evaluator")) == (
        "the task is an evaluator, and takes no part in training: the workers evaluate together",
    )
    assert problems_in(tf_config({"wroker": TWO}, index=2)) == (
        "the role 'wroker' (did you mean 'worker'?)",
        "the task is worker 2, and the cluster lists 0 of these",
    )
    assert problems_in(tf_config({"chief": ["a:1", "b:1"], "worker": "c:1"}, "worker", "x")) == (
        "for the role 'worker' 'c:1', which isn't a list of addresses",
        "2 chiefs: there can be one",
        "the task's index is 'x', which isn't a number",
    )
    assert problems_in(tf_config({"worker": ["a:1", "a:1", 7]}, index=-1)) == (
        "the task's index is -1, which isn't a number",
        "workers 0 and 1 have the same address 'a:1'",
        "worker 2: 7 isn't host:port",
    )


def test_the_message_as_a_whole() -> None:
    with pytest.raises(PlacementError) as caught:
        find_cluster(tf_config({"worker": ["a:1"], "ps": ["p:1"]}, index=1))
    assert str(caught.value) == (
        "Finding the workers in TF_CONFIG.\n"
        "  found 2 problems:\n"
        "    - parameter servers (ps): a model is trained by workers alone here\n"
        "    - the task is worker 1, and the cluster lists 1 of these\n"
        '  to fix it: TF_CONFIG=\'{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", '
        '"index": 0}}\''
    )


# ------------------------------------------------------------------------------------------------------ plain variables


def test_plain_variables() -> None:
    assert found_in({"TRANSFERKIT_WORKERS": " a:1, b:2,", "TRANSFERKIT_INDEX": "1"}) == Cluster(("a:1", "b:2"), 1)
    assert problems_in({"TRANSFERKIT_WORKERS": "a:1,b"}) == ("TRANSFERKIT_INDEX isn't set", "worker 1: 'b' isn't host:port")
    assert problems_in({"TRANSFERKIT_INDEX": "one"}) == (
        "TRANSFERKIT_WORKERS isn't set",
        "TRANSFERKIT_INDEX is 'one', which isn't a number",
    )
    assert problems_in({"TRANSFERKIT_WORKERS": ",", "TRANSFERKIT_INDEX": "0"}) == ("TRANSFERKIT_WORKERS names no worker",)
    assert problems_in({"TRANSFERKIT_WORKERS": "a:1,b:1", "TRANSFERKIT_INDEX": "2"}) == (
        "the index 2; of 2 workers the last is number 1",
    )


def rank(number: object = 1, size: object = 3, address: str = "10.0.0.1", port: object = 29500, **more: str) -> dict[str, str]:
    return {"RANK": f"{number}", "WORLD_SIZE": f"{size}", "MASTER_ADDR": address, "MASTER_PORT": f"{port}", **more}


def test_rank_and_world_size() -> None:
    assert found_in(rank()) == Cluster(("10.0.0.1:29501", ":29502", ":29503"), 1)
    here = ("127.0.0.1:29501", "127.0.0.1:29502", "127.0.0.1:29503")
    assert found_in(rank(address="127.0.0.1")) == Cluster(here, 1)
    assert found_in(rank(LOCAL_WORLD_SIZE="3")).is_complete
    assert not found_in(rank(LOCAL_WORLD_SIZE="2")).is_complete
    assert found_in(rank(address="fe80::2")).workers[0] == "[fe80::2]:29501"


def test_rank_and_world_size_that_do_not_fit() -> None:
    assert problems_in({"RANK": "1"}) == ("WORLD_SIZE isn't set", "MASTER_PORT isn't set", "MASTER_ADDR isn't set")
    assert problems_in({"WORLD_SIZE": "2"})[0] == "RANK isn't set"
    assert problems_in(rank(3)) == ("RANK is 3 and WORLD_SIZE 3: the last rank is 2",)
    assert problems_in(rank(0, 0)) == ("WORLD_SIZE is 0",)
    assert problems_in(rank(-1)) == ("RANK is '-1', which isn't a number",)
    assert problems_in(rank(port=65533)) == (
        "MASTER_PORT is 65533: the workers have the 3 ports after it, and ports are 1 to 65535",
    )
    assert problems_in(rank(address="a b")) == ("worker 0: 'a b:29501' isn't host:port",)


# ---------------------------------------------------------------------------------------------------------------- Slurm


def slurm(rank: object = 2, size: object = 5, nodes: str = "n[1-2],gpu5", tasks: str = "2(x2),1", **more: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": f"{rank}",
        "SLURM_STEP_NUM_TASKS": f"{size}",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_JOB_ID": "12034",
        "SLURM_STEP_ID": "1",
        **more,
    }


def test_a_step_of_slurm() -> None:
    base = 15000 + 16 * 35
    expected = (f"n1:{base}", f"n1:{base + 1}", f"n2:{base}", f"n2:{base + 1}", f"gpu5:{base}")
    assert found_in(slurm()) == Cluster(expected, 2)
    assert found_in(slurm(SLURM_NODEID="1", SLURM_LOCALID="0")) == Cluster(expected, 2)
    assert found_in(slurm(), port=7000).workers[:2] == ("n1:7000", "n1:7001")
    older = {name: value for name, value in slurm().items() if name != "SLURM_STEP_NUM_TASKS"}
    assert found_in({**older, "SLURM_NTASKS": "5"}) == Cluster(expected, 2)


def test_a_step_of_slurm_that_does_not_fit() -> None:
    assert problems_in({"SLURM_STEP_NODELIST": "n["}) == (
        "SLURM_PROCID isn't set",
        "SLURM_NTASKS isn't set",
        "SLURM_STEP_NODELIST: 'n[' in 'n[' isn't the name of a node",
        "SLURM_STEP_TASKS_PER_NODE isn't set",
        "SLURM_JOB_ID isn't set, from which the ports are made; give a port",
    )
    assert problems_in(slurm(size=4, nodes="n[1-2]")) == (
        "2 nodes in SLURM_STEP_NODELIST, and 3 in SLURM_STEP_TASKS_PER_NODE",
        "5 tasks in SLURM_STEP_TASKS_PER_NODE, and 4 in SLURM_STEP_NUM_TASKS",
    )
    assert problems_in(slurm(tasks="2(2)")) == ("SLURM_STEP_TASKS_PER_NODE is '2(2)'; it should be like '2(x3),1'",)
    assert problems_in(slurm(5)) == ("the index 5; of 5 workers the last is number 4",)
    # --distribution=cyclic deals the tasks out like cards
    assert problems_in(slurm(1, SLURM_NODEID="1", SLURM_LOCALID="0")) == (
        "task 1 is task 0 of node 1; by blocks it would be task 1 of node 0",
    )


def test_the_nearest_variables_count() -> None:
    everything = {
        **slurm(),
        **rank(0, 1),
        "TRANSFERKIT_WORKERS": "own:1",
        "TRANSFERKIT_INDEX": "0",
        **tf_config({"worker": ["tf:1"]}),
    }
    order = []
    for gone in (["TF_CONFIG"], ["TRANSFERKIT_WORKERS", "TRANSFERKIT_INDEX"], ["RANK"], []):
        order.append(found_in(everything).workers[0].partition(":")[0])
        everything = {name: value for name, value in everything.items() if name not in gone}
    assert order == ["tf", "own", "10.0.0.1", "n1"]  # and WORLD_SIZE alone is no torchrun's


# The forms that slurm_hostlist_create(3), Slurm::Hostlist(3) and the manual pages of sinfo and scontrol show, by hand.
DOCUMENTED = {
    "linux[1-3,6]": "linux1 linux2 linux3 linux6",
    "tux[0-5,12,20-25]": "tux0 tux1 tux2 tux3 tux4 tux5 tux12 tux20 tux21 tux22 tux23 tux24 tux25",
    "node1,node[2-5,12]": "node1 node2 node3 node4 node5 node12",
    "adev[8-10]": "adev8 adev9 adev10",
    "node[01-03,7],gpu5": "node01 node02 node03 node7 gpu5",
    "dev[098-101]": "dev098 dev099 dev100 dev101",
    "c[1-2]n[01-02]": "c1n01 c1n02 c2n01 c2n02",
    "rack1-[3-4]-ib,login": "rack1-3-ib rack1-4-ib login",
    "single": "single",
}


@pytest.mark.parametrize("text", DOCUMENTED)
def test_slurm_lists_of_nodes_as_documented(text: str) -> None:
    assert slurm_nodes(text) == DOCUMENTED[text].split()


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One part within brackets and what it stands for, counted on the fingers: each number is the one before plus one."""
    first, more, width = draw(st.integers(0, 120)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
    numbers = [first]
    while len(numbers) <= more:
        numbers.append(numbers[-1] + 1)
    padded = [f"{number:0{width}d}" for number in numbers]
    # A range's width is that of its first number: 8-11 is 8, 9, 10, 11 and 08-11 is 08, 09, 10, 11.
    text = padded[0] if len(padded) == 1 and draw(st.booleans()) else f"{padded[0]}-{padded[-1]}"
    return text, padded


@st.composite
def names(draw: st.DrawFn) -> tuple[str, list[str]]:
    prefix, suffix = draw(st.from_regex(r"[a-z][a-z-]{0,4}", fullmatch=True)), draw(st.sampled_from(["", "-ib", "x"]))
    parts = draw(st.lists(ranges(), max_size=3))
    if not parts:
        return prefix + suffix, [prefix + suffix]
    text = ",".join(text for text, _ in parts)
    return f"{prefix}[{text}]{suffix}", [f"{prefix}{number}{suffix}" for _, numbers in parts for number in numbers]


@given(st.lists(names(), min_size=1, max_size=4))
def test_slurm_lists_of_nodes(parts: list[tuple[str, list[str]]]) -> None:
    assert slurm_nodes(",".join(text for text, _ in parts)) == [node for _, nodes in parts for node in nodes]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no node"),
        ("a,,b", "'' in 'a,,b' isn't the name of a node"),
        ("a[1-2", "'a[1-2' in 'a[1-2' isn't the name of a node"),
        ("a]1[", "'a]1[' in 'a]1[' isn't the name of a node"),
        ("a[]", "[] in 'a[]' isn't a list of numbers like [01-03,7]"),
        ("a[1-]", "[1-] in 'a[1-]' isn't a list of numbers like [01-03,7]"),
        ("bgl[000x111]", "[000x111] in 'bgl[000x111]' isn't a list of numbers like [01-03,7]"),
        ("a[3-1]", "[3-1] in 'a[3-1]' counts down"),
        ("a[1-1000000000]", "more than 100000 nodes in 'a[1-1000000000]'"),
        ("a[1-9999]b[1-9999]", "more than 100000 nodes in 'a[1-9999]b[1-9999]'"),
        ("a b", "'a b' in 'a b' isn't the name of a node"),
    ],
)
def test_what_is_no_list_of_nodes(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        slurm_nodes(text)
    assert str(caught.value) == said


@given(st.text(st.sampled_from("an019-,[]() x"), max_size=12))
@example("a[1-1]]")
def test_any_text_is_a_list_of_nodes_or_a_value_error(text: str) -> None:
    try:
        nodes = slurm_nodes(text)
    except ValueError:
        return
    assert nodes
    assert not any(set(node) & set("[], ") for node in nodes)


SAID = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70_000) | st.sampled_from(["worker", "chief", "ps", "a:1", "b:2", "0", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["worker", "chief", "type", "index", "ps"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(SAID, SAID)
def test_any_tf_config_is_a_cluster_or_an_error_with_words(cluster: Any, task: Any) -> None:
    try:
        found = find_cluster({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})})
    except PlacementError:
        return
    assert found is None or found.index < found.size
