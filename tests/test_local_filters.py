"""A list filter or order means what Google's AIP-160 and AIP-132 say, on the protobuf messages of the API itself."""

import pytest
from google.cloud.aiplatform_v1 import types

from helpers.local import errors, filters

Artifact, Context, Model = types.Artifact.pb(), types.Context.pb(), types.Model.pb()


def artifacts():
    first = Artifact(
        name="a", display_name="data one", schema_title="system.Dataset", state="LIVE", labels={"team": "red"}
    )
    first.metadata.update({"rmse": 0.5, "good": True, "field:1": "x", "nested": {"deep": 3}})
    first.create_time.FromJsonString("2026-01-01T10:00:00Z")
    second = Artifact(name="b", display_name='model "two"', schema_title="system.Model", uri="gs://b/m")
    second.metadata.update({"rmse": 20, "good": False})
    second.create_time.FromJsonString("2026-01-01T10:00:00.5Z")
    third = Artifact(name="c", schema_title="system.Model")
    third.create_time.FromJsonString("2026-01-02T00:00:00.123456Z")
    return [first, second, third]


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("", "abc"),
        ("  ", "abc"),
        ('schema_title="system.Model"', "bc"),
        ("schemaTitle = 'system.Model'", "bc"),
        ('schema_title!="system.Model"', "a"),
        ('schema_title="system.*"', "abc"),
        ('schema_title="*.Model"', "bc"),
        ('NOT schema_title="*.Model"', "a"),
        ('display_name="model \\"two\\""', "b"),
        ('display_name:"data"', "a"),
        ("uri:*", "b"),
        ("state=LIVE", "a"),
        ("labels.team=red", "a"),
        ("labels.team!=red", "bc"),
        ("labels:team", "a"),
        ("labels.team:*", "a"),
        # numbers are compared as numbers: as texts, 20 would be less than 3
        ("metadata.rmse.number_value > 3", "b"),
        ("metadata.rmse.number_value <= 0.50", "a"),
        ("metadata.rmse > 3", "b"),
        ("metadata.good.bool_value = true", "a"),
        ("metadata.good = False", "b"),
        ('metadata."field:1".string_value = "x"', "a"),
        ("metadata.nested.deep.number_value=3", "a"),
        # a value of another kind is no zero
        ('metadata."field:1".number_value = 0', ""),
        ('create_time > "2026-01-01T10:00:00Z"', "bc"),
        ('create_time = "2026-01-01T12:00:00+02:00"', "a"),
        ("create_time <= 2026-01-01T11:30:00-04:00", "ab"),
        # OR binds closer than AND, and a space means AND
        ('name=a OR name=b schema_title="system.Model"', "b"),
        ("name=a AND name=b OR name=a", "a"),
        ("(name=a AND name=b) OR name=c", "c"),
        ('same("b")', "b"),
        ('same:"c" AND schema_title="system.Model"', "c"),
    ],
)
def test_filter_selects(expression, names):
    functions = {"same": lambda artifact, name: artifact.name == name}
    assert "".join(artifact.name for artifact in filters.select(artifacts(), expression, functions)) == names


def test_list_fields_hold_values():
    contexts = [Context(name="run", parent_contexts=["one", "two"]), Context(name="other", parent_contexts=["three"])]
    assert [context.name for context in filters.select(contexts, 'parent_contexts:"two"')] == ["run"]


@pytest.mark.parametrize(
    "expression",
    [
        "name=",
        "name",
        "=a",
        '(name="a"',
        'name="a")',
        'name="a',
        "nonsense=1",
        'unknown("a")',
        "metadata.rmse.number_value = many",
        "create_time > yesterday",
        "metadata.nested = 3",
        "(" * 2000 + "name=a" + ")" * 2000,
        "NOT " * 2000 + "name=a",
    ],
)
def test_wrong_filter_is_refused_in_words(expression):
    with pytest.raises(errors.Refused, match="Invalid filter") as caught:
        filters.select(artifacts(), expression)
    assert caught.value.code.name == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("", "abc"),
        ("create_time desc", "cba"),
        ("createTime", "abc"),
        ("schema_title desc, create_time desc", "cba"),
        ("schema_title, create_time desc", "acb"),
        ("metadata.rmse.number_value desc", "bac"),
    ],
)
def test_order(expression, names):
    assert "".join(artifact.name for artifact in filters.order(artifacts(), expression)) == names


@pytest.mark.parametrize("expression", ["create_time down", "create_time desc now", "nonsense", "metadata"])
def test_wrong_order_is_refused_in_words(expression):
    with pytest.raises(errors.Refused, match=r"Invalid .*order"):
        filters.order(artifacts(), expression)
