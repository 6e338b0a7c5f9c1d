// sbom, which lists what is in a binary of Go's.
module crishim/test/tools/sbom

go 1.26.0

require github.com/CycloneDX/cyclonedx-go v0.12.0
