"""The demo on digits and its report."""
