"""Audits and tunings as pages for people: one self-contained HTML file, or Markdown."""
