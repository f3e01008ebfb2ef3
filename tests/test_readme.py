"""The numbers in README and docs are those of results/reference/."""

from runner import results, speed


def test_the_results_in_readme_and_docs_are_what_the_reference_gives(repo):
    readme = (repo / "README.md").read_text("utf-8")
    hint = "python -m runner.results makes them anew"
    assert results.with_results(readme) == readme, hint
    assert (repo / "docs/results.md").read_text("utf-8") == results.results_page(), hint
    assert (repo / "docs/speed.md").read_text("utf-8") == speed.speed_page(), hint
