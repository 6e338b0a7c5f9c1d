package checkpoint

import (
	"bytes"
	"strings"
	"testing"
)

func TestWriteLog(t *testing.T) {
	const cri = "2026-11-23T16:49:03.2Z stdout F count 1\n2026-11-23T16:49:03.3Z stderr P {\"log\":\n"
	long := strings.Repeat("x", 1<<20)
	for _, test := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"the CRI's own format", cri, cri},
		{"Docker's", `{"log":"count 1\n","stream":"stdout","time":"2026-11-23T16:49:03.2Z"}` + "\n" +
			`{"log":"part","stream":"stderr","time":"2026-11-23T16:49:03.3Z","attrs":{"a":"b"}}` + "\n" +
			`{"log":"\u003c\"q\"\u003e\n","stream":"stderr","time":"2026-11-23T16:49:03.3Z"}` + "\n" +
			`{"log":"\n","stream":"stdout","time":"2026-11-23T16:49:03.4Z"}` + "\n",
			"2026-11-23T16:49:03.2Z stdout F count 1\n" + "2026-11-23T16:49:03.3Z stderr P part\n" +
				"2026-11-23T16:49:03.3Z stderr F <\"q\">\n" + "2026-11-23T16:49:03.4Z stdout F \n"},
		{"a line that is torn", `{"log":"count 1\n","stream":"stdout","time":"2026-11-23T16:49:03.2Z"}` + "\n" + `{"log":"cou`,
			"2026-11-23T16:49:03.2Z stdout F count 1\n" + `{"log":"cou`},
		{"a line without end", "{" + long, "{" + long},
		{"another object", "{}\n", "{}\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			if err := writeLog(&out, strings.NewReader(test.in)); err != nil {
				t.Fatal(err)
			}
			if out.String() != test.want {
				t.Errorf("got\n%.300s\nwant\n%.300s", out.String(), test.want)
			}
		})
	}
}
