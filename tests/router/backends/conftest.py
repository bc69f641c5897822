"""The shared class says what it found, as test modules do."""

import pytest

pytest.register_assert_rewrite("tests.router.backends.conformance")
