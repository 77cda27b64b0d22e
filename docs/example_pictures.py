"""What the gallery needs to run the examples: where they write their pictures, and how these come onto the page."""

from pathlib import Path

OUTPUT = Path(__file__).parent / "_build" / "examples"


def arguments(gallery_conf, script_vars):
    return ["-o", str(OUTPUT / Path(script_vars["src_file"]).stem)]


def taken(block, block_vars, gallery_conf):
    """Move what an example has written to where its page wants it, in the order of the names."""
    from sphinx_gallery.scrapers import figure_rst

    written = sorted((OUTPUT / Path(block_vars["src_file"]).stem).glob("*.png"))
    targets = [Path(next(block_vars["image_path_iterator"])) for _ in written]
    for source, target in zip(written, targets, strict=True):
        source.replace(target)
    return figure_rst([str(target) for target in targets], gallery_conf["src_dir"])
