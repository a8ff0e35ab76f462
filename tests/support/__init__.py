"""Helpers of the tests: factories of adapters, test servers, a stub engine, and checks of responses."""
