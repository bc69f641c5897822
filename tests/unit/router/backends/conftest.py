"""Enables assert rewriting for the shared class, and runs Ray's suite on a loop that never stops."""

import inspect

import pytest

pytest.register_assert_rewrite("tests.unit.router.backends.conformance")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the coroutines of `ray_suite.py`, which is started with pytest-asyncio in its strict mode."""
    if pyfuncitem.path.stem != "ray_suite" or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from tests.testkit.thread_loop import LOOP  # late: its thread is for that suite alone

    names = pyfuncitem._fixtureinfo.argnames
    LOOP.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
