"""Helpers of the tests; pytest collects nothing here."""
