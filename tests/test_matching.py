"""Matching is pure: these tests need no Keras and no file."""

from __future__ import annotations

from transferkit.weights.mapping import FileArray, Match, ModelVariable, Rules
from transferkit.weights.matching import match
from transferkit.weights.names import canonical, covers, creation_number, is_automatic, kind_of, snake_case


def dense(path: str, inputs: int, units: int, *, kind: str = "Dense") -> list[tuple[str, str, tuple[int, ...], str]]:
    return [(path, "kernel", (inputs, units), kind), (path, "bias", (units,), kind)]


def in_file(*layers: list[tuple[str, str, tuple[int, ...], str]], kinds: bool = True) -> list[FileArray]:
    return [
        FileArray(f"{path}/{variable}", shape, path, variable, kind if kinds else "")
        for layer in layers
        for path, variable, shape, kind in layer
    ]


def in_model(*layers: list[tuple[str, str, tuple[int, ...], str]]) -> list[ModelVariable]:
    return [
        ModelVariable(f"{path}/{variable}", shape, path, variable, kind)
        for layer in layers
        for path, variable, shape, kind in layer
    ]


def layers_of(found: Match) -> dict[str, str]:
    """From the model's layers to the file's."""
    return {pair.target.rpartition("/")[0]: pair.source.rpartition("/")[0] for pair in found.pairs}


def test_chosen_names_decide_whatever_the_order() -> None:
    found = match(in_file(dense("query", 4, 4), dense("key", 4, 4)), in_model(dense("key", 4, 4), dense("query", 4, 4)))
    assert layers_of(found) == {"key": "key", "query": "query"}
    assert {pair.how for pair in found.pairs} == {"name"}
    assert not found.problems
    assert not found.missing
    assert not found.unused


def test_made_up_names_are_matched_by_structure_and_not_by_their_numbers() -> None:
    saved = in_file(dense("dense_1", 784, 128), dense("dense_2", 128, 64), dense("dense_3", 64, 10), kinds=False)
    model = in_model(dense("dense", 784, 128), dense("dense_1", 128, 64), dense("dense_2", 64, 10))
    found = match(saved, model)
    assert layers_of(found) == {"dense": "dense_1", "dense_1": "dense_2", "dense_2": "dense_3"}
    assert {pair.how for pair in found.pairs} == {"structure"}


def test_a_made_up_name_fits_a_chosen_one_where_nothing_else_does() -> None:
    found = match(in_file(dense("dense", 8, 4), dense("dense_1", 4, 2)), in_model(dense("dense", 8, 4), dense("head", 4, 2)))
    assert layers_of(found) == {"dense": "dense", "head": "dense_1"}


def test_equal_shapes_are_taken_in_order_of_creation_only_when_both_sides_are_whole() -> None:
    saved = in_file(*(dense(f"dense_{i}", 8, 8) for i in (5, 6, 7)))
    assert layers_of(match(saved, in_model(*(dense(f"dense_{i}", 8, 8) for i in (1, 2, 3))))) == {
        "dense_1": "dense_5",
        "dense_2": "dense_6",
        "dense_3": "dense_7",
    }
    one_more = match(saved, in_model(*(dense(f"dense_{i}", 8, 8) for i in (1, 2, 3, 4))))
    assert not one_more.pairs
    assert len(one_more.problems) == 1
    assert one_more.problems[0].startswith(
        "more than one way to match: in the file 'dense_5' (kernel (8, 8), bias (8,)), 'dense_6'"
    )
    assert one_more.rules == ('.map({"dense_1": "dense_5"}) and so on, one entry for each',)


def test_equal_shapes_listed_against_the_order_of_creation_are_ambiguous_until_asked_for() -> None:
    saved = in_file(dense("dense_6", 8, 8), dense("dense_5", 8, 8))
    model = in_model(dense("dense", 8, 8), dense("dense_1", 8, 8))
    found = match(saved, model)
    assert not found.pairs
    assert ".by_order()" in found.rules
    asked = match(saved, model, Rules(by_order=True))
    assert layers_of(asked) == {"dense": "dense_6", "dense_1": "dense_5"}
    assert asked.notes == ("2 layers were matched by their order alone, as asked: 'dense_6 → dense', 'dense_5 → dense_1'",)


def test_five_layers_into_three_is_ambiguous_and_never_a_prefix() -> None:
    found = match(
        in_file(*(dense(f"dense_{i}", 8, 8) for i in range(5))), in_model(*(dense(f"dense_{i}", 8, 8) for i in range(3)))
    )
    assert not found.pairs
    assert len(found.missing) == 6
    assert len(found.unused) == 10


def test_an_inserted_layer_shifts_nothing() -> None:
    saved = in_file(dense("a", 8, 8), dense("b", 8, 8), dense("c", 8, 8))
    found = match(saved, in_model(dense("a", 8, 8), dense("x", 8, 8), dense("b", 8, 8), dense("c", 8, 8)))
    assert layers_of(found) == {"a": "a", "b": "b", "c": "c"}
    assert set(found.missing) == {"x/kernel", "x/bias"}
    assert found.rules == ('.skip("x/*", of="model")',)


def test_two_chosen_names_that_differ_are_never_joined_by_shape() -> None:
    found = match(in_file(dense("old_head", 8, 5)), in_model(dense("new_head", 8, 5)))
    assert not found.pairs
    assert found.missing["new_head/kernel"] == ("no 'new_head' in the file; its 'old_head' has the same shapes but another name")
    assert found.rules == (
        '.skip("new_head/*", of="model")',
        '.skip("old_head/*", of="file")',
        '.map({"new_head": "old_head"})',
        ".by_order()",
    )
    assert layers_of(match(in_file(dense("old_head", 8, 5)), in_model(dense("new_head", 8, 5)), Rules(by_order=True)))


def test_a_nested_model_takes_a_flat_file_by_path() -> None:
    found = match(in_file(dense("conv1", 3, 4)), in_model(dense("backbone/conv1", 3, 4)))
    assert layers_of(found) == {"backbone/conv1": "conv1"}
    assert {pair.how for pair in found.pairs} == {"path"}


def test_a_flat_name_that_two_nested_models_have_is_ambiguous() -> None:
    found = match(in_file(dense("conv1", 3, 4)), in_model(dense("left/conv1", 3, 4), dense("right/conv1", 3, 4)))
    assert not found.pairs
    assert found.problems == (
        "more than one way to match: in the file 'conv1' (kernel (3, 4), bias (4,)); "
        "in the model 'left/conv1' (kernel (3, 4), bias (4,)), 'right/conv1' (kernel (3, 4), bias (4,))",
    )


def test_models_named_differently_around_a_layer_are_not_the_same() -> None:
    found = match(in_file(dense("student/fc", 3, 4)), in_model(dense("teacher/fc", 3, 4)))
    assert not found.pairs


def test_layers_of_other_kinds_are_not_the_same() -> None:
    found = match(in_file(dense("dense", 3, 4)), in_model(dense("einsum_dense", 3, 4, kind="EinsumDense")))
    assert not found.pairs


def test_unnamed_arrays_of_a_normalization_may_be_read_two_ways() -> None:
    saved = [FileArray(f"bn/vars/{i}", (4,), "bn", str(i), "BatchNormalization") for i in range(3)]
    model = in_model([("bn", v, (4,), "BatchNormalization") for v in ("beta", "moving_mean", "moving_variance")])
    found = match(saved, model)
    assert not found.pairs
    assert "without center or without scale" in found.problems[0]
    whole = in_model([("bn", v, (4,), "BatchNormalization") for v in ("gamma", "beta", "moving_mean", "moving_variance")])
    four = match([FileArray(f"bn/vars/{i}", (4,), "bn", str(i), "BatchNormalization") for i in range(4)], whole)
    assert [(p.target, p.source) for p in four.pairs] == [
        ("bn/gamma", "bn/vars/0"),
        ("bn/beta", "bn/vars/1"),
        ("bn/moving_mean", "bn/vars/2"),
        ("bn/moving_variance", "bn/vars/3"),
    ]


def test_a_variable_more_or_less_within_a_layer_is_reported() -> None:
    found = match(in_file(dense("fc", 3, 4)), in_model([("fc", "kernel", (3, 4), "Dense")]))
    assert [pair.target for pair in found.pairs] == ["fc/kernel"]
    assert found.unused == {"fc/bias": "the model's 'fc' has no 'bias', only 'kernel'"}
    other = match(in_file([("fc", "kernel", (3, 4), "Dense")]), in_model(dense("fc", 3, 4)))
    assert other.missing == {"fc/bias": "the file's 'fc' has no 'bias', only 'kernel'"}


def test_rules_leave_out_rename_and_assign() -> None:
    saved = in_file(dense("features/a", 3, 4), dense("fc", 4, 2))
    model = in_model(dense("backbone/a", 3, 4), dense("head", 4, 2), dense("extra", 4, 4))
    rules = Rules(rename=(("^features/", "backbone/"),), map={"head": "fc"}, skip=("extra/*",))
    found = match(saved, model, rules)
    assert [(p.target, p.how) for p in found.pairs] == [
        ("backbone/a/kernel", "name"),
        ("backbone/a/bias", "name"),
        ("head/kernel", "rule"),
        ("head/bias", "rule"),
    ]
    assert found.skipped == {"extra/kernel": ".skip('extra/*')", "extra/bias": ".skip('extra/*')"}
    assert not found.problems
    only = match(saved, model, Rules(rename=(("^features/", "backbone/"),), only=("backbone",)))
    assert set(only.skipped) == {"head/kernel", "head/bias", "extra/kernel", "extra/bias"}
    assert set(only.left_out) == {"fc/kernel", "fc/bias"}


def test_a_rule_that_matches_nothing_is_a_problem() -> None:
    found = match(in_file(dense("head", 3, 4)), in_model(dense("head", 3, 4)), Rules(skip=("haed/*",), map={"hed": "head"}))
    assert found.problems == (
        ".skip('haed/*') matches nothing (did you mean 'head'?)",
        ".map: the model has no 'hed' (did you mean 'head'?)",
    )


def test_what_the_file_lists_twice_and_the_model_holds_once_is_told() -> None:
    model = [ModelVariable("tower/shared/kernel", (3, 3), "tower/shared", "kernel", "Dense", ("shared/kernel",))]
    saved = [
        FileArray("tower/shared/kernel", (3, 3), "tower/shared", "kernel", "Dense"),
        FileArray("shared/kernel", (3, 3), "shared", "kernel", "Dense"),
    ]
    found = match(saved, model)
    assert [(p.target, p.source) for p in found.twins] == [("tower/shared/kernel", "shared/kernel")]
    assert not found.unused


def test_names() -> None:
    assert snake_case("Conv2D") == "conv2d"
    assert snake_case("BatchNormalization") == "batch_normalization"
    assert kind_of("Convolution2D") == kind_of("conv2d_3") == kind_of("keras.layers>Conv2D") == "conv2d"
    assert is_automatic("block_3", "Block")
    assert not is_automatic("block_3")
    assert creation_number("a/bidirectional_2/forward_lstm/lstm_cell") == (2, 0, 0)
    assert canonical("bi/forward_lstm_3/lstm_cell_1") == "bi/forward_lstm"
    assert covers("backbone/*", "backbone/a/kernel")
    assert not covers("a/*", "backbone/a/kernel")
