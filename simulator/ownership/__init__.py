"""The owner proves: keys, and the tests that ask a suspect."""
