"""What teachers say about utterances: computed live, or cached."""
