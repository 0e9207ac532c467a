"""Small programs of generation, each with a `main(backend)`; tests/test_lang_examples.py runs them on every backend."""
