"""A site's data: manifest, importers, one ingest step, patient-grouped split, training cohort."""
