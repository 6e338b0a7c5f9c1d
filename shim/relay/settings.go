package relay

import (
	"encoding/binary"

	"golang.org/x/net/http2"
)

// SETTINGS pass one for one, so that each side acknowledges the other's and
// the acknowledgements pass too. What the relay takes part in itself is
// replaced: the HPACK table and frame size are its own on each hop.

// eachSetting calls do for every setting of a SETTINGS frame, in order.
func eachSetting(f frame, do func(http2.Setting)) {
	for p := f.payload(); len(p) >= 6; p = p[6:] {
		do(http2.Setting{ID: http2.SettingID(binary.BigEndian.Uint16(p)), Val: binary.BigEndian.Uint32(p[2:])})
	}
}

func appendSettings(b []byte, settings []http2.Setting) []byte {
	b = appendHeader(b, 6*len(settings), http2.FrameSettings, 0, 0)
	for _, s := range settings {
		b = binary.BigEndian.AppendUint16(b, uint16(s.ID))
		b = binary.BigEndian.AppendUint32(b, s.Val)
	}
	return b
}

// hop returns the settings of f that concern the far side. MAX_FRAME_SIZE
// stays away because 16384 is the default, HEADER_TABLE_SIZE because the first
// SETTINGS of each hop sets it to 0 for good, ENABLE_PUSH likewise.
func hop(f frame) ([]http2.Setting, error) {
	var out []http2.Setting
	var err error
	eachSetting(f, func(s http2.Setting) {
		if invalid := s.Valid(); invalid != nil && err == nil {
			err = &connError{http2.ErrCode(invalid.(http2.ConnectionError)), "invalid " + s.ID.String()}
		}
		switch s.ID {
		case http2.SettingHeaderTableSize, http2.SettingMaxFrameSize, http2.SettingEnablePush:
		default:
			out = append(out, s)
		}
	})
	return out, err
}

// toRuntime is the client's SETTINGS as the runtime sees it.
func toRuntime(f frame, first bool) ([]http2.Setting, error) {
	out, err := hop(f)
	if first {
		out = append(out,
			http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0},
			http2.Setting{ID: http2.SettingEnablePush, Val: 0})
	}
	return out, err
}

// toClient is the runtime's SETTINGS as the client sees it: a header list that
// the relay cannot hold should fail in the client, with its own clear error.
func toClient(f frame, first bool) ([]http2.Setting, error) {
	out, err := hop(f)
	for i := range out {
		if out[i].ID == http2.SettingMaxHeaderListSize {
			out[i].Val = min(out[i].Val, maxHeaderList)
		}
	}
	if first {
		// In front, so that a limit of the runtime's own wins.
		out = append(ownSettings(), out...)
	}
	return out, err
}

// ownSettings is what the relay tells every client.
func ownSettings() []http2.Setting {
	return []http2.Setting{
		{ID: http2.SettingHeaderTableSize, Val: 0},
		{ID: http2.SettingMaxHeaderListSize, Val: maxHeaderList},
	}
}
