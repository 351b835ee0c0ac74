"""`compress profiles`: the recipes that come with the package."""

from .flags import Json


def profiles(json: Json = False) -> None:
    """List the shipped profiles."""
    import compressor
    from compressor.run.tables import Table

    from .render import show_json, show_table

    found = compressor.list_profiles()
    if json:
        show_json(found)
        return
    rows = [(p["name"], p["description"], ", ".join(p["stages"])) for p in found]
    show_table(Table("Profiles", ("name", "description", "stages"), rows, prose=True))
