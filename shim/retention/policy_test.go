package retention

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// Archives are written NAME:CONTAINER:AGE in hours:SIZE, with a p behind for one that is pinned and an r for one that is read.
func parse(t *testing.T, text string, now time.Time) (archives []Archive) {
	t.Helper()
	for word := range strings.FieldsSeq(text) {
		parts := strings.Split(word, ":")
		age, err := time.ParseDuration(parts[2] + "h")
		if err != nil {
			t.Fatal(err)
		}
		size, flags := int64(0), strings.TrimLeft(parts[3], "0123456789")
		for _, digit := range strings.TrimSuffix(parts[3], flags) {
			size = 10*size + int64(digit-'0')
		}
		archives = append(archives, Archive{
			Name: parts[0], Container: parts[1], Made: now.Add(-age), Size: size,
			Pinned: strings.Contains(flags, "p"), Read: strings.Contains(flags, "r"),
		})
	}
	return archives
}

func TestPlan(t *testing.T) {
	now := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	for name, test := range map[string]struct {
		policy   Policy
		archives string
		want     string // names, in order
		why      string // of the first
	}{
		"no bounds":                    {Policy{}, "a:x:9:9 b:x:8:9", "", ""},
		"nothing there":                {Policy{PerContainer: 1, Bytes: 1, Age: 1}, "", "", ""},
		"too many, oldest first":       {Policy{PerContainer: 2}, "d:x:1:1 a:x:4:1 c:x:2:1 b:x:3:1", "a b", "of its container at most 2 stay, and 3 are younger"},
		"as many as may":               {Policy{PerContainer: 2}, "a:x:4:1 b:x:3:1", "", ""},
		"each container for itself":    {Policy{PerContainer: 1}, "a:x:4:1 b:y:3:1 c:x:2:1 d:y:1:1", "a b", ""},
		"pinned ones do not count":     {Policy{PerContainer: 1}, "a:x:4:1p b:x:3:1p c:x:2:1", "", ""},
		"pinned ones stay":             {Policy{PerContainer: 1}, "a:x:4:1p b:x:3:1 c:x:2:1", "b", ""},
		"no younger one for one read":  {Policy{PerContainer: 2}, "a:x:4:1r b:x:3:1 c:x:2:1", "", ""},
		"others than one read":         {Policy{PerContainer: 1}, "a:x:4:1r b:x:3:1 c:x:2:1", "b", ""},
		"of the same age, by name":     {Policy{PerContainer: 1}, "b:x:4:1 a:x:4:1", "a", ""},
		"too old":                      {Policy{Age: 3 * time.Hour}, "a:x:4:1 b:x:3:1 c:x:2:1", "a", "it is older than 3h0m0s"},
		"too old, the youngest too":    {Policy{Age: time.Hour}, "a:x:4:1 b:y:3:1", "a b", ""},
		"too old, pinned or read":      {Policy{Age: time.Hour}, "a:x:4:1p b:y:3:1r", "", ""},
		"from the future":              {Policy{Age: time.Hour}, "a:x:-4:1", "", ""},
		"too large in all":             {Policy{Bytes: 10}, "a:x:4:5 b:y:3:5 c:z:2:3", "a", "the archives have 13 B in all, and 10 B stay"},
		"just large enough":            {Policy{Bytes: 13}, "a:x:4:5 b:y:3:5 c:z:2:3", "", ""},
		"the youngest stays":           {Policy{Bytes: 10}, "a:x:4:5 b:y:3:50", "a", ""},
		"pinned ones take room":        {Policy{Bytes: 10}, "a:x:4:8p b:y:3:5 c:z:2:3", "b", ""},
		"one read takes room to come":  {Policy{Bytes: 10}, "a:x:4:8r b:y:3:5 c:z:2:3", "", ""},
		"a share":                      {Policy{Share: 0.01}, "a:x:4:5 b:y:3:5 c:z:2:3", "a", "the archives have 13 B in all, and 10 B stay"},
		"the smaller of share and sum": {Policy{Share: 0.01, Bytes: 6}, "a:x:4:5 b:y:3:5 c:z:2:3", "a b", ""},
		"what is gone counts no more":  {Policy{Age: 3 * time.Hour, PerContainer: 2, Bytes: 10}, "a:x:4:9 b:x:2:5 c:x:1:5", "a", "it is older than 3h0m0s"},
		"each for its reason":          {Policy{Age: 5 * time.Hour, PerContainer: 2, Bytes: 10}, "a:x:9:1 b:x:4:1 c:y:3:8 d:x:2:4 e:x:1:4", "a b c", ""},
	} {
		t.Run(name, func(t *testing.T) {
			archives := parse(t, test.archives, now)
			before := slices.Clone(archives)
			removals := test.policy.Plan(archives, 1000, now)
			var got []string
			for _, r := range removals {
				got = append(got, r.Name)
				if r.Why == "" {
					t.Errorf("%s goes for no reason", r.Name)
				}
			}
			if strings.Join(got, " ") != test.want {
				t.Errorf("to go are %q, want %q", got, test.want)
			}
			if test.why != "" && (len(removals) == 0 || removals[0].Why != test.why) {
				t.Errorf("it is %+v, want the reason %q", removals, test.why)
			}
			for i := range archives {
				if archives[i] != before[i] {
					t.Error("the list of the caller was changed")
				}
			}
		})
	}
}
