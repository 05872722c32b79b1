import click
@click.group()
def pipeline(): pass
