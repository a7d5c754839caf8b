"""`sa-convert recipes`: what is shipped, or one of them."""

import click


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the shipped recipes, or print one.

    NAME is a shipped recipe or a recipe file. It is checked, and printed as it is written.
    """
    from sa_convert.plan.recipe_file import load_recipe, recipe_text, shipped_recipes

    if name is not None:
        click.echo(recipe_text(name), nl=False)
        return
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    width = max(map(len, recipes))
    for shipped, recipe in recipes.items():
        click.echo(f"{shipped:<{width}}  {recipe.description}")
