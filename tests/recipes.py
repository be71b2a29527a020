"""All that the settings of a recipe may be, for hypothesis."""

from hypothesis import strategies as st

from dansm.scale.model.recipe import SETTINGS, Recipe, kind_of


def values_of(name):
    kind, rules = kind_of(name), SETTINGS[name].metadata
    if rules["choices"]:
        one = st.sampled_from(rules["choices"])
    elif kind.type is int:
        one = st.integers(rules["least"], rules["most"])
    elif kind.type is float:
        one = st.floats(rules["least"], rules["most"], allow_nan=False, allow_infinity=False)
    elif kind.type is bool:
        one = st.booleans()
    else:
        one = st.text(st.characters(exclude_categories=["Cs"]))
    if kind.several:
        one = st.lists(one, min_size=not rules["empty"], max_size=4).map(tuple)
    return st.none() | one if kind.optional else one


recipes = st.fixed_dictionaries({name: values_of(name) for name in SETTINGS}).map(
    lambda settings: settings | {"accumulate": min(settings["accumulate"], settings["batch"]),
                                 "target": settings["target"] if settings["flow"] == "diffusion" else "noise"}
).map(lambda settings: Recipe(**settings))
