"""Tests that compare with torch and diffusers; `tests/conftest.py` collects them only where both are installed."""


def pytest_itemcollected(item):
    item.add_marker("peers")
