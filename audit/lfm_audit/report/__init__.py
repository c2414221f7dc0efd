"""Pages made of audits and tunings; needs the extra `report`."""
