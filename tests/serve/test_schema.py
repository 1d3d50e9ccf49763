"""The OpenAPI document is true: requests made from it, right and wrong ones, get what it says."""

from __future__ import annotations

import pytest
from serving import Running

pytest.importorskip("schemathesis", reason="schemathesis comes with the tests' requirements")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance


def examine(server: Running, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        def check(case: schemathesis.Case) -> None:
            nonlocal tried
            tried += 1
            response = case.call(base_url=server.url)
            assert response.status_code < 500 or response.status_code == 503, response.text
            case.validate_response(
                response,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    status_code_conformance,
                    response_schema_conformance,
                ],
            )

        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing to get wrong
            given_cases = given(case=operation.as_strategy(generation_mode=mode))
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )(given_cases(check))()
    assert tried > examples


def test_the_document_is_true(server: Running) -> None:
    examine(server, 8)


@pytest.mark.full
def test_the_document_is_true_at_length(server: Running) -> None:
    examine(server, 150)
