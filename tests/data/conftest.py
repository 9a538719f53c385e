"""Small image folders."""

import pytest
from pictures import picture


@pytest.fixture
def write_images(tmp_path):
    """Write PNG files of random pixels, named by their paths, into a folder; gives the folder back."""

    def write(*paths, size=(8, 8), mode="RGB", folder="pictures"):
        root = tmp_path / folder
        for seed, path in enumerate(paths):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            picture(seed, size, mode).save(root / path)
        return root

    return write
