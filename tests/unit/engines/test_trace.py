"""The file of a trace: what is written is read, and what is torn or foreign is not taken for a record."""

import pytest

from engines.trace import TraceModel, TraceRequest, encode_line, read_trace

MODEL = TraceModel(model_id="org/a", weight_bytes=5, workspace_bytes=2, load_s=1.5)
LATE = TraceRequest(at_s=9.5, model_id="org/a", tokens=3, seconds=0.25)
EARLY = TraceRequest(at_s=1.0, model_id="org/a")


def test_records_are_read_as_they_were_written_and_requests_in_order_of_time() -> None:
    trace = read_trace([encode_line(MODEL), encode_line(LATE), encode_line(EARLY)])

    assert trace.models == {"org/a": MODEL}
    assert trace.requests == [EARLY, LATE]


def test_a_line_names_its_model_as_the_api_does() -> None:
    assert b'"kind":"request"' in encode_line(LATE)
    assert b'"model":"org/a"' in encode_line(LATE)


def test_a_last_line_that_was_cut_off_is_left_out() -> None:
    assert read_trace([encode_line(MODEL), encode_line(LATE)[:-5]]).requests == []


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"no json\n", b'{"kind":"request","at_s":"x","model":"a"}\n'])
def test_a_line_that_is_no_record_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(ValueError, match="line 2 is no record of a trace"):
        read_trace([encode_line(MODEL), line])
